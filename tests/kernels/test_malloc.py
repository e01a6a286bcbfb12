import os
import subprocess
import sys

import pytest

FREED = """
import resource, sys, torch
from reallm.kernels import set_mmap_threshold
if sys.argv[1] == "yes" and not set_mmap_threshold():
    sys.exit(77)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.ones(4 << 20).sum()  # freed: glibc raises its threshold to this size
before = resident()
blocks = [torch.ones(2 << 20) for _ in range(24)]  # 8 MB each
last = torch.ones(2 << 20)  # the heap below it cannot be returned
del blocks
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_blocks_that_were_freed_are_not_resident_any_more():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FREED]
    default, returned = (subprocess.run([*command, w], capture_output=True, env=environment) for w in ("no", "yes"))
    if returned.returncode == 77:
        pytest.skip("no glibc")
    assert int(returned.stdout) < 30e6
    assert int(default.stdout) > 100e6  # so that this test can fail
