"""What a step of training frees stays with the process for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COUNT = """
import resource, torch
from fxopt.cpu_allocator import keep_freed_memory

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        blocks = [torch.zeros(12 << 20, dtype=torch.uint8) for _ in range(4)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // calls

keep_freed_memory()
faults(3)
print(faults(5))
"""


def _faults() -> int:
    run = subprocess.run([sys.executable, "-c", _COUNT], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_blocks_that_are_freed_together_are_not_mapped_anew() -> None:
    # Without it there are as many faults as pages, unless the kernel gives pages of 2 MiB.
    pages = (48 << 20) // 4096
    assert _faults() < pages // 20
