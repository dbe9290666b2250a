"""What a call costs on this machine: time and memory, with spread, never a bare number."""

from fxopt.timing.kernel_timing import Timing, compare_kernels, timings_in
from fxopt.timing.latency import Latency, Ratio, latency, ratio, summarize
from fxopt.timing.machine import fingerprint
from fxopt.timing.memory import Memory, peak_memory

__all__ = [
    "Latency",
    "Memory",
    "Ratio",
    "Timing",
    "compare_kernels",
    "fingerprint",
    "latency",
    "peak_memory",
    "ratio",
    "summarize",
    "timings_in",
]
