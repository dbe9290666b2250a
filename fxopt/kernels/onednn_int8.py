"""Products of 8-bit integers on a CPU: by oneDNN where it is exact, else in float32.

    q @ Wᵀ   for q `[..., K]` and W int8 `[N, K]`

A CPU without an int8 dot product multiplies uint8 and int8 by vpmaddubsw, which adds two products
in 16 bits that saturate: 255 * 127 * 2 > 32 767. With |W| <= 64 none can, and there oneDNN takes
half the time of float32 (Zen 3, one thread, 1024 x 384 x 1536: 8.5 ms for 17.8). Other weights are
multiplied in float32, which holds all integers up to 2²⁴, so sums of 1024 products at a time.
Source: oneDNN, "Nuances of int8 Computations".
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.device import Device
from fxopt.kernels.onednn import dense_linear, has_onednn
from fxopt.kernels.packed_weights import PACKED_WEIGHTS

LARGEST_EXACT = 64
"""The largest magnitude of int8 weights whose products with uint8 saturate in no pair."""

_X86 = ("x86_64", "AMD64", "i386", "i686")
_CODES = 128
_LARGEST_CODE, _LARGEST_WEIGHT = 255, 127
_FLOAT_INTEGERS = 1 << 24
"""float32 holds every integer up to here."""

_INNER = _FLOAT_INTEGERS // (128 * 128)


@functools.cache
def takes_full_range() -> bool:
    """Whether oneDNN multiplies uint8 by int8 of any size exactly and fast in this process.

    Asked of the library by a small product of extremes, since its own cap (ONEDNN_MAX_CPU_ISA)
    decides as much as the CPU does.
    """
    if platform.machine() not in _X86:
        return bool(Device.describe("cpu").accelerates(torch.int8))
    if not torch.backends.mkldnn.is_available():
        return False
    rows, inner, outputs = 16, 64, 16
    q = torch.full((rows, inner), _LARGEST_CODE, dtype=torch.uint8)
    weight = torch.full((outputs, inner), _LARGEST_WEIGHT, dtype=torch.int8)
    product = _multiply(q, _pack(weight), outputs, 0)
    return bool((product == _LARGEST_CODE * _LARGEST_WEIGHT * inner).all())


def packed_exactly(weight: Tensor) -> Tensor | None:
    """`weight` `[N, K]` laid out for oneDNN, remembered beside it; None where the products of it
    with uint8 would not be exact, and for empty weights and inference tensors."""
    return _packed(weight, _pack_exact)


def product_without_dot_product(q: Tensor, weight: Tensor) -> Tensor:
    """q @ Wᵀ int32 `[M, N]` of int8 `q` `[M, K]` and `weight` `[N, K]`, neither of them empty, for
    a CPU that has no int8 dot product."""
    packed = _packed(weight, _pack_exact_in_float)
    if packed is None:
        return _in_float(q, weight)
    y = _multiply(q.view(torch.uint8) ^ _CODES, packed, weight.shape[0], _CODES)
    # In its own memory: fresh pages for another one cost as much as the pass over it.
    return y.view(torch.int32).copy_(y)


def _packed(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor | None:
    if not has_onednn() or not weight.numel() or weight.is_inference():
        return None
    packed = PACKED_WEIGHTS.get(weight, pack)
    return packed if packed.is_mkldnn else None


def _pack_exact(weight: Tensor) -> Tensor:
    """The packed weight, or an empty tensor to remember that there can't be one."""
    exact = takes_full_range() or _largest(weight) <= LARGEST_EXACT
    return _pack(weight) if exact else weight.new_empty(0)


def _pack_exact_in_float(weight: Tensor) -> Tensor:
    """The same where float32 holds every sum of products with int8 too."""
    sums = weight.abs().sum(1, dtype=torch.int64)
    held = _CODES * int(sums.max()) <= _FLOAT_INTEGERS
    return _pack_exact(weight) if held else weight.new_empty(0)


def _largest(weight: Tensor) -> int:
    low, high = weight.aminmax()
    return max(-int(low), int(high))


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def _multiply(q: Tensor, packed: Tensor, outputs: int, zero_point: int) -> Tensor:
    """(q - zero_point) @ Wᵀ, float32."""
    ones, zeros = _ones(outputs), no_zero_points(outputs)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@functools.cache
def _ones(channels: int) -> Tensor:
    return torch.ones(channels)


@functools.cache
def no_zero_points(channels: int) -> Tensor:
    """int32 zeros, one for each output channel of a symmetric weight."""
    return torch.zeros(channels, dtype=torch.int32)


def _in_float(q: Tensor, weight: Tensor) -> Tensor:
    total = q.new_zeros((q.shape[0], weight.shape[0]), dtype=torch.int32)
    for first in range(0, q.shape[1], _INNER):
        part = slice(first, first + _INNER)
        total += dense_linear(q[:, part].float(), weight[:, part].float()).to(torch.int32)
    return total
