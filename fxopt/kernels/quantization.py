"""Quantization to 8 bits: a scale per token or per tensor for activations, per row for weights.

    symmetric   scale = max|row| / 127           q = round(row / scale) in [-127, 127]
    affine      scale = (high - low) / 255       q = round(row / scale) + zero point in [-128, 127]
    given       scale and zero point are constants, found by calibration
                row ~ (q - zero point) * scale

Symmetric leaves -128 out, so that negation is exact and the largest magnitude maps to itself on
both sides; affine stretches [low, high] to hold zero, which then comes back exactly.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018; rounding is to nearest, ties to even, as
`torch.round` and ONNX's QuantizeLinear do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.errors import KernelError

_LARGEST, _LOW = 127, -128
_STEPS = _LARGEST - _LOW
# The smallest normal float32. A smaller scale would have an infinite reciprocal; with this floor a
# row of zeros or of denormals quantizes to numbers of at most 127 and never divides by zero.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Rows at a time, so that temporaries stay in a cache (256 KB) and leave no holes in the heap.
_CHUNK_ELEMENTS = 1 << 16

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("quantize_per_token(Tensor x) -> (Tensor, Tensor)")
_library.define("quantize_per_token_affine(Tensor x) -> (Tensor, Tensor, Tensor)")
_library.define("quantize(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
_library.define(
    "dequantize(Tensor q, Tensor scale, ScalarType dtype, Tensor? zero_point=None) -> Tensor"
)


def row_scale(rows: Tensor, largest: float) -> Tensor:
    """`[..., 1]`: what maps the largest magnitude of each row of float32 to `largest`."""
    # amax has no answer for rows of no element, and such a row has nothing to scale.
    if rows.shape[-1] == 0:
        return rows.new_full((*rows.shape[:-1], 1), _SMALLEST_SCALE)
    return (rows.abs().amax(-1, keepdim=True) / largest).clamp_min(_SMALLEST_SCALE)


def _scale(rows: Tensor) -> Tensor:
    return row_scale(rows, _LARGEST)


def _round(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows * scale.reciprocal()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the shape of `x`, and float32 scales of shape `[..., 1]`, one a row of the last axis.

    A row of zeros comes back as exact zeros. A row that holds NaN or infinity gets a scale that is
    not finite, so nothing computed from it is. No gradient passes: rounding has none.
    """
    if not x.is_floating_point():
        raise KernelError(f"quantize_per_token needs a floating-point tensor, not {x.dtype}")
    return _symmetric(x.detach().to(torch.float32))


def quantize_per_token_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 of the shape of `x`, float32 scales and int8 zero points, both of shape `[..., 1]`.

    A row's range is stretched to hold zero. A row of zeros comes back as exact zeros; one that
    holds NaN or infinity gets a scale that is not finite. No gradient passes: rounding has none.
    """
    if not x.is_floating_point():
        raise KernelError(f"quantize_per_token_affine needs a floating-point tensor, not {x.dtype}")
    rows = x.detach().to(torch.float32)
    if rows.shape[-1] == 0:
        scale = _scale(rows)
        return rows.to(torch.int8), scale, scale.to(torch.int8)
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    # Halved first: the difference of two large numbers must not overflow.
    scale = ((high / 2 - low / 2) / (_STEPS / 2)).clamp_min(_SMALLEST_SCALE)
    zero_point = (_LOW - low / scale).round().clamp(_LOW, _LARGEST)
    q = ((rows * scale.reciprocal()).round() + zero_point).clamp(_LOW, _LARGEST)
    return q.to(torch.int8), scale, zero_point.to(torch.int8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`round(x / scale) + zero_point`, saturated, of the shape of `x` in the zero point's dtype.

    `scale` is float32 and `zero_point` int8 or uint8; both hold one number, or broadcast against
    `x`. Infinity saturates and NaN becomes some number: an integer can't hold either. Raises
    `KernelError` for other dtypes.
    """
    if not x.is_floating_point() or zero_point.dtype not in (torch.int8, torch.uint8):
        raise KernelError(
            "quantize needs a floating-point tensor and an int8 or uint8 zero point, not "
            f"{x.dtype} and {zero_point.dtype}"
        )
    limits = torch.iinfo(zero_point.dtype)
    q = (x.detach().to(torch.float32) * scale.reciprocal()).round() + zero_point.to(torch.float32)
    return q.clamp(limits.min, limits.max).to(zero_point.dtype)


def dequantize(
    q: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None
) -> Tensor:
    """`(q - zero_point) * scale` in `dtype`; `scale` and `zero_point` broadcast against `q`
    (`[..., 1]` a row, `[N, 1]` a weight).

    The product is rounded once: to float64 if `dtype` is that, else to float32 and then to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # In place, since a weight of this size is held once here, not twice.
    y = q.to(wide)
    if zero_point is not None:
        y = y.sub_(zero_point.to(wide))
    return y.mul_(scale.to(wide)).to(dtype)


def type_of_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors of the kind that `quantize_per_token(x)` gives; tracing it takes 40 ms."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scale


def type_of_quantized_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the kind that `quantize_per_token_affine(x)` gives."""
    q, scale = type_of_quantized(x)
    return q, scale, torch.empty_like(scale, dtype=torch.int8)


_library.impl("quantize_per_token", quantize_per_token, "CompositeImplicitAutograd")
_library.impl("quantize_per_token_affine", quantize_per_token_affine, "CompositeImplicitAutograd")
_library.impl("quantize", quantize, "CompositeImplicitAutograd")
_library.impl("dequantize", dequantize, "CompositeImplicitAutograd")


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[N, K]` and float32 scales `[N, 1]` of a weight `[N, K]`: one scale per output channel.

    Works on a few rows at a time; beyond the result it needs about 1 MB whatever the weight's
    size. Raises `KernelError` for a weight that is not a matrix of finite floating-point numbers.
    """
    hint = "int8 cannot express it, leave this layer in floating point"
    return quantize_matrix(weight, torch.int8, _symmetric, "quantize_weight", hint)


def _symmetric(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scale(rows)
    return _round(rows, scale), scale


def quantize_matrix(
    weight: Tensor,
    dtype: torch.dtype,
    rounded: Callable[[Tensor], tuple[Tensor, Tensor]],
    name: str,
    hint: str,
) -> tuple[Tensor, Tensor]:
    """`[N, K]` of `dtype` and float32 scales `[N, 1]`, a few rows at a time, by what `rounded`
    makes of float32 rows. Raises `KernelError`, from `name` and ending in `hint`, for a weight that
    is not a matrix of finite floating-point numbers."""
    if weight.dim() != 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise KernelError(f"{name} needs a float matrix, not {weight.dtype} of {shape}")
    with torch.no_grad():
        q = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
        step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for first in range(0, weight.shape[0], step):
            part = slice(first, first + step)
            q[part], scale[part] = rounded(weight.detach()[part].to(torch.float32))
        if not bool(scale.isfinite().all()):
            row = int((~scale.isfinite()).flatten().nonzero()[0])
            raise KernelError(f"{name}: output channel {row} holds NaN or infinity; {hint}")
    return q, scale
