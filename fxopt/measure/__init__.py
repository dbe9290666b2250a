"""What a call costs on this machine: time and memory, with spread, never a bare number."""

from fxopt.measure.latency import Latency, Ratio, latency, ratio
from fxopt.measure.machine import fingerprint
from fxopt.measure.memory import Memory, peak_memory

__all__ = ["Latency", "Memory", "Ratio", "fingerprint", "latency", "peak_memory", "ratio"]
