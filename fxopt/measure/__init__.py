"""What a call costs on this machine: time and memory, with spread, never a bare number."""

from fxopt.measure.contest import Timing, compare_kernels, timings_in
from fxopt.measure.latency import Latency, Ratio, latency, ratio, summarize
from fxopt.measure.machine import fingerprint
from fxopt.measure.memory import Memory, peak_memory

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
