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

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "quantize_tokens(Tensor x, Tensor? factor, Tensor? shift, bool affine) "
    "-> (Tensor, Tensor, Tensor)"
)
_OF_PACKED_SCHEMA = (
    "packed_int8_linear_tokens(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? bias, str post_op, bool affine) -> (Tensor, Tensor, Tensor)"
)
_library.define(_SCHEMA)
_OF_FUSED_SCHEMA = (
    "int8_linear_fused_tokens(Tensor q, Tensor scale, Tensor? zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? weight_sums, Tensor? bias, str post_op, bool affine) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(_OF_PACKED_SCHEMA)
_library.define(_OF_FUSED_SCHEMA)


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


def packed_int8_linear_tokens(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    post_op: str,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`packed_int8_linear` of these arguments in float32, its rows `[..., N]` by `quantize_tokens`.

    Raises `KernelError` where `packed_int8_linear` does.
    """
    y = torch.ops.fxopt.packed_int8_linear(
        q, scale, zero_point, weight, weight_scale, bias, post_op, None, None, torch.float32
    )
    return quantize_tokens(y, None, None, affine)


def int8_linear_fused_tokens(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    post_op: str,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_linear_fused` of these arguments in float32, its rows `[..., N]` by `quantize_tokens`.

    Raises `KernelError` where `int8_linear_fused` does.
    """
    y = torch.ops.fxopt.int8_linear_fused(
        q, scale, zero_point, weight, weight_scale, weight_sums, bias, torch.float32, post_op
    )
    return quantize_tokens(y, None, None, affine)


def _fake_of_packed(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    post_op: str,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.ops.fxopt.packed_int8_linear(
        q, scale, zero_point, weight, weight_scale, bias, post_op, None, None, torch.float32
    )
    return _fake(y, None, None, affine)


def _fake_of_fused(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    post_op: str,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.ops.fxopt.int8_linear_fused(
        q, scale, zero_point, weight, weight_scale, weight_sums, bias, torch.float32, post_op
    )
    return _fake(y, None, None, affine)


_library.impl("quantize_tokens", quantize_tokens, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, quantize_tokens)
torch.library.register_fake("fxopt::quantize_tokens", _fake, lib=_library)

_library.impl("packed_int8_linear_tokens", packed_int8_linear_tokens, "CompositeExplicitAutograd")
on_cpu(_OF_PACKED_SCHEMA, packed_int8_linear_tokens)
torch.library.register_fake("fxopt::packed_int8_linear_tokens", _fake_of_packed, lib=_library)

_library.impl("int8_linear_fused_tokens", int8_linear_fused_tokens, "CompositeExplicitAutograd")
on_cpu(_OF_FUSED_SCHEMA, int8_linear_fused_tokens)
torch.library.register_fake("fxopt::int8_linear_fused_tokens", _fake_of_fused, lib=_library)
