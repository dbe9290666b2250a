"""Peak memory of one call, read from the operating system or the CUDA allocator, or not at all.

On a CPU the kernel's high-water mark of resident memory (`VmHWM` in proc(5)) is set back before
the call and read after it. It sees what an allocator's own count can't: the scratch and packing
buffers of oneDNN and MKL, and those of compiled code. Two things would make it lie, and both are
ruled out: freed memory that compiled programs (`cpu_allocator`) and malloc (`malloc_trim`) keep is
handed back first, and a trial allocation of known size must be seen in full, else nothing is
measured (another malloc may be preloaded).
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.cpu_allocator import release
from fxopt.timing.latency import collector_off

_PROCESS = Path("/proc/self")
_CALLS = 3
_TRIAL_TENSORS = 16
_TRIAL_BYTES = 1 << 20
_TRIAL_SEEN = 0.9


@dataclass(frozen=True)
class Memory:
    """Extra bytes of one call at its peak, beyond what was held before it, and who counted them."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:.1f} MB ({self.source})"


def peak_memory(call: Callable[[], object], device: torch.device | str) -> Memory | None:
    """The extra memory that `call` needs at its peak, its result included; median of 3 calls.

    One call before them is not counted: it may compile, or fill a library's caches. None where no
    honest reading is possible: on a device that is neither CPU nor CUDA, on a CPU without Linux's
    `/proc/self/clear_refs` and glibc, or while another malloc hides what is freed.
    """
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        call()
        with collector_off():
            return Memory(_median(lambda: _cuda_peak(call, device)), "CUDA allocator")
    if kind != "cpu" or not _resident_peak_is_true():
        return None
    call()
    with collector_off():
        return Memory(_median(lambda: _resident_peak(call)), "resident memory")


def _median(reading: Callable[[], int]) -> int:
    return int(statistics.median(reading() for _ in range(_CALLS)))


def _cuda_peak(call: Callable[[], object], device: torch.device | str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def _resident_peak(call: Callable[[], object]) -> int:
    release()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _resident_peak_is_true() -> bool:
    def trial() -> object:
        return [torch.ones(_TRIAL_BYTES, dtype=torch.uint8) for _ in range(_TRIAL_TENSORS)]

    if not (_PROCESS / "clear_refs").exists():
        return False
    try:
        trial()
        return _resident_peak(trial) >= _TRIAL_SEEN * _TRIAL_BYTES * _TRIAL_TENSORS
    except (OSError, AttributeError, StopIteration):
        return False


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
