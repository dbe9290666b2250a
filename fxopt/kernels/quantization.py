"""Symmetric int8 quantization: per token for activations, per output channel for weights.

    scale = max|row| / 127        q = round(row / scale) in [-127, 127]        row ~ q * scale

-128 is left out, so that negation is exact and the largest magnitude maps to itself on both sides.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018; rounding is to nearest, ties to even, as
`torch.round` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.errors import KernelError

_LARGEST = 127
# The smallest normal float32. A smaller scale would have an infinite reciprocal; with this floor a
# row of zeros or of denormals quantizes to numbers of at most 127 and never divides by zero.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Rows at a time, so that temporaries stay in a cache (256 KB) and leave no holes in the heap.
_CHUNK_ELEMENTS = 1 << 16

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("quantize_per_token(Tensor x) -> (Tensor, Tensor)")
_library.define("dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor")


def _scale(rows: Tensor) -> Tensor:
    # amax has no answer for rows of no element, and such a row has nothing to scale.
    if rows.shape[-1] == 0:
        return rows.new_full((*rows.shape[:-1], 1), _SMALLEST_SCALE)
    return (rows.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)


def _round(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows * scale.reciprocal()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the shape of `x`, and float32 scales of shape `[..., 1]`, one a row of the last axis.

    A row of zeros comes back as exact zeros. A row that holds NaN or infinity gets a scale that is
    not finite, so nothing computed from it is. No gradient passes: rounding has none.
    """
    if not x.is_floating_point():
        raise KernelError(f"quantize_per_token needs a floating-point tensor, not {x.dtype}")
    rows = x.detach().to(torch.float32)
    scale = _scale(rows)
    return _round(rows, scale), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * scale` in `dtype`; `scale` broadcasts against `q` (`[..., 1]` a row, `[N, 1]` a weight).

    The product is rounded once: to float64 if `dtype` is that, else to float32 and then to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # In place, since a weight of this size is held once here, not twice.
    return q.to(wide).mul_(scale.to(wide)).to(dtype)


def type_of_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors of the kind that `quantize_per_token(x)` gives; tracing it takes 40 ms."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scale


_library.impl("quantize_per_token", quantize_per_token, "CompositeImplicitAutograd")
_library.impl("dequantize", dequantize, "CompositeImplicitAutograd")


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[N, K]` and float32 scales `[N, 1]` of a weight `[N, K]`: one scale per output channel.

    Works on a few rows at a time; beyond the result it needs about 1 MB whatever the weight's
    size. Raises `KernelError` for a weight that is not a matrix of finite floating-point numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise KernelError(f"quantize_weight needs a float matrix, not {weight.dtype} of {shape}")
    with torch.no_grad():
        q = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
        step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for first in range(0, weight.shape[0], step):
            rows = weight.detach()[first : first + step].to(torch.float32)
            scale[first : first + step] = _scale(rows)
            rounded = rows * scale[first : first + step].reciprocal()
            q[first : first + step] = rounded.round_().clamp_(-_LARGEST, _LARGEST)
        if not bool(scale.isfinite().all()):
            row = int((~scale.isfinite()).flatten().nonzero()[0])
            raise KernelError(
                f"quantize_weight: output channel {row} holds NaN or infinity; "
                "int8 cannot express it, leave this layer in floating point"
            )
    return q, scale
