import os
import subprocess
import sys

import pytest

import jaxlm
from jaxlm.training import host
from tests.runs import ROOT
from tests.tiny import assert_same_bits

SCRIPT = """
import resource, sys
from jaxlm.training.host import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touch():
    block = libc.malloc(32 * 2**20)
    ctypes.memset(block, 1, 32 * 2**20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_and_faults_no_more():
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(mode, **environment):
        command = [sys.executable, "-c", SCRIPT, mode]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | environment)
        return int(run.stdout)

    assert faults("keep") < 100 < faults("leave")
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 100  # as glibc was told
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072") > 100


RUN = """
import sys, warnings
from jaxlm import errors
from jaxlm.training import host
host.settle()
import jaxlm
from tests.tiny import tiny
sys.exit(errors.exit_code(lambda: jaxlm.train(tiny(eval__every=0), sys.argv[1]).exit_code))
"""


def run(cache, workdir):
    """A run in a process of its own, whose JAX was told no place for programs; (what it said, its parameters)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAXLM_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(workdir)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, jaxlm.load(workdir).params


def programs(cache):
    return {path for path in (cache / "programs").rglob("*-cache")}


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process(tmp_path):
    cache = tmp_path / "cache"
    _, first = run(cache, tmp_path / "first")
    kept = programs(cache)
    assert any("train_step" in path.name for path in kept)
    _, second = run(cache, tmp_path / "second")
    assert programs(cache) == kept
    assert_same_bits(first, second)

    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    said, third = run(cache, tmp_path / "third")
    assert "Error reading persistent compilation cache entry" in said
    assert_same_bits(first, third)


@pytest.mark.slow
def test_a_cache_that_can_not_be_written_is_warned_of(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "programs").write_text("no folder")
    said, _ = run(cache, tmp_path / "run")
    assert "programs" in said and "Not a directory" in said


def test_a_place_that_jax_was_given_stays(monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    assert before  # by conftest
    host.keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
