import subprocess
import sys

import pytest

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
    def faults(mode):
        run = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 100 < faults("leave")
