"""The CPU's operators in C++, compiled once for this machine, in place of a library's.

oneDNN's products are tuned for other CPUs than AMD's, each call of it costs 10 to 40 microseconds
before it multiplies, and torch has no attention on CPUs that multiplies in bfloat16 without AMX.
The sources beside this file are one product of registers for float32, bfloat16 and 8-bit integers
(`product.h`), linear layers and attention on it. What they do not take goes on to the library.
"""

from fxopt.kernels.native.building import load, loaded, without
from fxopt.kernels.native.registration import on_cpu, serves

__all__ = ["load", "loaded", "on_cpu", "serves", "without"]
