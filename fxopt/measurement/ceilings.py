"""What this machine can do at most, measured: products a second by dtype, and memory bandwidth.

    operations   of one large product, 2 · M · N · K over its shortest time; the fastest of torch's
                 own kernel and those of this package
    bandwidth    of one large copy, the bytes read and written over its shortest time

The shortest time, since a ceiling is what nothing exceeds: a busy moment must not lower it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxopt.device import Answer, Device
from fxopt.errors import FxoptError
from fxopt.kernels import multiplies_int8
from fxopt.kernels.float8 import FLOAT8
from fxopt.timing.latency import latency

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, FLOAT8)
_REPEATS, _SECONDS = 5, 0.1
# M, N, K: large enough to fill the machine, small enough to take a few hundredths of a second.
_PRODUCT = {"cpu": (512, 1024, 4096), "cuda": (8192, 8192, 8192)}
# Several times the last-level caches of today's processors.
_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}

Kernel = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """`flops`: operations a second by the dtype that is multiplied (`int8` included); `bandwidth`:
    bytes a second; `missing`: why a dtype has no ceiling here, by dtype."""

    device: str
    flops: Mapping[str, float]
    bandwidth: float
    missing: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rates = [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flops.items()]
        return ", ".join([*rates, f"memory {self.bandwidth / 1e9:.3g} GB/s"])

    def product_seconds(self, flops: int, dtype: str) -> float:
        """The least time of `flops` operations; in a dtype without a ceiling, as in float32."""
        return flops / self.flops.get(dtype, self.flops["float32"])

    def memory_seconds(self, count: int) -> float:
        """The least time in which `count` bytes move."""
        return count / self.bandwidth


def ceilings(device: torch.device | str) -> Ceilings | None:
    """The ceilings of `device` with torch's present number of threads and float32 precision.

    Measured once per process, in a second or two. None for a device that is neither CPU nor CUDA.
    """
    place = torch.device(device)
    if place.type not in _PRODUCT:
        return None
    return _measured(str(place), torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _measured(device: str, threads: int, precision: str) -> Ceilings:
    place = torch.device(device)
    contest, missing = {"copy": _copy(place)}, {}
    with torch.no_grad():
        for dtype in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            fast = _is_fast(Device.describe(place), dtype)
            running, reason = _running(place, dtype) if fast else ([], fast.reason)
            contest |= {f"{name} {index}": kernel for index, kernel in enumerate(running)}
            if not running:
                missing[name] = reason
        times = latency(contest, _REPEATS, _SECONDS)
    shortest: dict[str, float] = {}
    for key, time in times.items():
        name = key.partition(" ")[0]
        shortest[name] = min(shortest.get(name, math.inf), min(time.samples) / 1e3)
    bandwidth = 2 * _COPIED_BYTES[place.type] / shortest.pop("copy")
    operations = 2 * math.prod(_PRODUCT[place.type])
    rates = {name: operations / seconds for name, seconds in shortest.items()}
    return Ceilings(device, rates, bandwidth, missing)


def _is_fast(device: Device, dtype: torch.dtype) -> Answer:
    return multiplies_int8(device) if dtype == torch.int8 else device.accelerates(dtype)


def _running(device: torch.device, dtype: torch.dtype) -> tuple[list[Kernel], str]:
    """The kernels that run here; where none does, why the last one failed."""
    running, reason = [], "no kernel is known"
    for kernel in _kernels(device, dtype):
        try:
            kernel()
            running.append(kernel)
        except (RuntimeError, FxoptError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    return running, reason


def _copy(device: torch.device) -> Kernel:
    source = torch.ones(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _kernels(device: torch.device, dtype: torch.dtype) -> Iterator[Kernel]:
    m, n, k = _PRODUCT[device.type]
    ops = torch.ops.fxopt
    if dtype.is_floating_point and dtype.itemsize > 1:
        x, weight = (_values((rows, k), device).to(dtype) for rows in (m, n))
        yield lambda: torch.nn.functional.linear(x, weight)
        if device.type == "cpu":
            yield lambda: ops.packed_linear(x, weight, None, "none", None)
        return
    scales = torch.ones(m, 1, device=device), torch.ones(n, 1, device=device)
    if dtype == FLOAT8:
        q, weight = (_values((rows, k), device).to(dtype) for rows in (m, n))
        yield lambda: ops.float8_linear(q, scales[0], weight, scales[1], None, torch.bfloat16)
        return
    # Within 7 bits, so that they are multiplied exactly on any CPU.
    q, weight = (_values((rows, k), device).mul(9).clamp(-63, 63).to(dtype) for rows in (m, n))
    yield lambda: ops.int8_product(q, weight)
    if device.type == "cpu":
        one, zero = torch.ones(()), torch.full((), 128, dtype=torch.uint8)
        unsigned = ops.shift_to_unsigned(q)
        yield lambda: ops.packed_int8_linear(
            unsigned, one, zero, weight, scales[1], None, "none", None, None, torch.float32
        )


def _values(shape: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device)
