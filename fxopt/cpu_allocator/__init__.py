"""Memory that compiled programs give back and take again at each call, on a CPU.

glibc hands free memory at the end of its heap, and every large block, back to the system, by
thresholds that follow what the whole process frees. Memory taken anew comes as zeroed pages at a
fault each: BERT-base's int8 call of 103 ms takes up to 135 beside other work. Blocks of calls that
run through `reusing` stay in a pool of this process instead, as the blocks of CUDA's caching
allocator do, until 64 calls have not needed them, no compiled program is left, or memory runs out.
"""

from fxopt.cpu_allocator.malloc import keep_freed_memory
from fxopt.cpu_allocator.pool import kept_bytes, load, release, reusing

__all__ = ["keep_freed_memory", "kept_bytes", "load", "release", "reusing"]
