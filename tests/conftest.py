"""The surroundings of every test: CPU, no network, caches of its own, and the rule for tests that need a GPU.

Nothing here may import JAX at the top: the platform is chosen first.
"""

import errno
import functools
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

LOCAL_HOSTS = ("127.", "::1", "localhost", "0.0.0.0")


def wants_gpu(markers: str) -> bool:
    """Whether a `-m` expression asks for GPU tests; JAXLM_TEST_GPU=1 asks for them without one."""
    return os.environ.get("JAXLM_TEST_GPU") == "1" or re.search(r"(?<!not )\bgpu\b", markers) is not None


def compile_quickly() -> str:
    """XLA's flags for programs that compile in a fifth of the time (in newer versions: half), and run half as fast."""
    older = importlib.metadata.version("jaxlib").startswith("0.10.")  # newer ones refuse the second flag
    return "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * older


def pytest_configure(config):
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our forks don't mix
    os.environ.setdefault("NPROC", "2")  # XLA's threads: the bits of a result on the CPU depend on their number
    if not hasattr(config, "workerinput"):  # one cache of compiled programs for all processes of this session
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxlm-test-programs-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    if wants_gpu(config.getoption("markexpr")):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share one GPU
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # float32 there is TF32 unless one asks
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("XLA_FLAGS", compile_quickly())
        if "jax" in sys.modules:  # too late for the variable, not for the setting
            sys.modules["jax"].config.update("jax_platforms", "cpu")
    os.environ["JAXLM_CACHE"] = tempfile.mkdtemp(prefix="jaxlm-test-cache-")  # one for each test process
    sys.addaudithook(_refuse_network)


def pytest_unconfigure(config):
    shutil.rmtree(os.environ.pop("JAXLM_CACHE", ""), ignore_errors=True)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("JAX_COMPILATION_CACHE_DIR", ""), ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not wants_gpu(item.config.getoption("markexpr")):
            pytest.skip("needs a GPU: run `pytest -m gpu` on a machine with one")
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU: JAX found only {jax.default_backend()}")


def _refuse_network(event: str, args: tuple) -> None:
    """What a machine without a network would do, also on one that has it. Local sockets stay usable."""
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else ""
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host or ""
    if host and not host.startswith(LOCAL_HOSTS):
        raise OSError(errno.ENETUNREACH, f"tests have no network, and one asked for {host}")


@pytest.fixture(scope="session", autouse=True)
def programs():
    """Compiled programs stay for the tests to come: more of them than a run's process has use for."""
    from jaxlm.training import steps

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "_built", functools.lru_cache(maxsize=16)(steps._built.__wrapped__))
        yield


@pytest.fixture(autouse=True)
def programs_of_its_own(request, programs):
    """A test that patches is given no program that was compiled without its patch, and leaves none with it."""
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    from jaxlm.training import steps

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "_built", functools.lru_cache(maxsize=None)(steps._built.__wrapped__))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run directory of a tiny model with checkpoints of steps 20 and 40."""
    import jaxlm
    from tests.tiny import tiny

    workdir = tmp_path_factory.mktemp("trained") / "run"
    jaxlm.train(tiny(steps=40, eval__every=20, checkpoint__every=20), workdir)
    return workdir
