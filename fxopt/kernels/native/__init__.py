"""The CPU's operators in C++, compiled once for this machine, in place of a library's.

oneDNN's products are tuned for other CPUs than AMD's, each call of it costs 10 to 40 microseconds
before it multiplies, and torch has no attention on CPUs that multiplies in bfloat16 without AMX.
The sources beside this file are two sets. One is for many rows on AVX-512: a product of registers
for float32, bfloat16 and 8-bit integers (`product.h`), linear layers and attention on it. The other
is for the few rows of a step of generation, on AVX2 or AVX-512 (`lanes.h`): attention to a prefix
that is read where it lies, products with narrow weights, and whole steps as lists of instructions
(`executor.h`), with threads that stay awake through one (`team.h`). What they do not take goes on
to the library.
"""

from fxopt.kernels.native.building import load, load_for, loaded, running, without
from fxopt.kernels.native.kernel_sets import PRODUCTS, decoding
from fxopt.kernels.native.registration import on_cpu

__all__ = ["PRODUCTS", "decoding", "load", "load_for", "loaded", "on_cpu", "running", "without"]
