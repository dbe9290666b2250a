"""Quantization of each token in one kernel, with the scale and shift of its channels before it.

    quantize_tokens(x, m, z)          =  quantize_per_token(x * m - z)    or its affine namesake
    packed_int8_linear_tokens(q, ...) =  quantize_tokens(packed_int8_linear(q, ...))
    int8_linear_fused_tokens(q, ...)  =  quantize_tokens(int8_linear_fused(q, ...))

The codes are given plus 128, as uint8: what int8 products multiply on a CPU.

All are among the compiled kernels on a CPU (`fxopt.kernels.native`): a row is read twice from the
first cache, and one that a linear gives is rounded before it leaves the second. Elsewhere they are
those equations, which a compiler had better be shown as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _packed(*inputs: Any) -> Tensor:
    y: Tensor = torch.ops.fxopt.packed_int8_linear(*inputs, None, None, torch.float32)
    return y


def _fused(*given: Any) -> Tensor:
    *inputs, post_op = given
    y: Tensor = torch.ops.fxopt.int8_linear_fused(*inputs, torch.float32, post_op)
    return y


def _define_after(linear: Callable[..., Tensor], schema: str) -> None:
    """An operator that is `linear` in float32, its rows `[..., N]` by `quantize_tokens`.

    It raises `KernelError` where `linear` does.
    """
    name = schema.partition("(")[0]

    def tokens(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, affine = given
        return quantize_tokens(linear(*inputs), None, None, affine)

    def fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, affine = given
        return _fake(linear(*inputs), None, None, affine)

    _library.define(schema)
    _library.impl(name, tokens, "CompositeExplicitAutograd")
    on_cpu(schema, tokens)
    torch.library.register_fake(f"fxopt::{name}", fake, lib=_library)


_library.impl("quantize_tokens", quantize_tokens, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, quantize_tokens)
torch.library.register_fake("fxopt::quantize_tokens", _fake, lib=_library)

_define_after(
    _packed,
    "packed_int8_linear_tokens(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? bias, str post_op, bool affine) -> (Tensor, Tensor, Tensor)",
)
_define_after(
    _fused,
    "int8_linear_fused_tokens(Tensor q, Tensor scale, Tensor? zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? weight_sums, Tensor? bias, str post_op, bool affine) "
    "-> (Tensor, Tensor, Tensor)",
)
