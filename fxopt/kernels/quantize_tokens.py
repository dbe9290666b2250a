"""Quantization of each token in one kernel, with the scale and shift of its channels before it.

    quantize_tokens(x, m, z)  =  quantize_per_token(x * m - z)            or its affine namesake

The codes are given plus 128, as uint8: what int8 products multiply on a CPU.

One of the compiled kernels on a CPU (`fxopt.kernels.native`), which read a row twice from the first
cache; elsewhere that equation, which a compiler had better be shown as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "quantize_tokens(Tensor x, Tensor? factor, Tensor? shift, bool affine) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(_SCHEMA)


def quantize_tokens(
    x: Tensor, factor: Tensor | None, shift: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes plus 128, uint8 of the shape of `x` `[..., K]`, and their float32 scales and int8 zero
    points (of the codes themselves), `[..., 1]` both.

    `factor` and `shift` are `[K]`. Without `affine` there are no zero points: `[0]`. No gradient
    passes. Raises `KernelError` where `x` is not of floating point.
    """
    if not x.is_floating_point():
        raise KernelError(f"quantize_tokens needs a floating-point tensor, not {x.dtype}")
    x = x.detach()
    x = x if factor is None else x * factor
    x = x if shift is None else x - shift
    ops = torch.ops.fxopt
    if affine:
        q, scale, zero_point = ops.quantize_per_token_affine(x)
    else:
        q, scale = ops.quantize_per_token(x)
        zero_point = scale.new_empty(0, dtype=torch.int8)
    return ops.shift_to_unsigned(q), scale, zero_point


def _fake(
    x: Tensor, factor: Tensor | None, shift: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    by_row = (*x.shape[:-1], 1)
    zero_points = x.new_empty(by_row if affine else (0,), dtype=torch.int8)
    scales = x.new_empty(by_row, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scales, zero_points


_library.impl("quantize_tokens", quantize_tokens, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, quantize_tokens)
torch.library.register_fake("fxopt::quantize_tokens", _fake, lib=_library)
