"""Linear layers whose input and weight are both rounded, in the same groups of input channels.

    round_groups(x, g)                  =  dq(quantize_per_token(x by groups of g))
    int8_grouped_linear(x, W, t, b)     =  int8_weight_only_linear(round_groups(x, g), W, t, b)
    int4_grouped_linear(x, P, s, b, z)  =  int4_weight_only_linear(round_groups(x, g), P, s, b, z)

for the groups of g columns that the weight's scales stand for. The compiled kernels multiply what a
group of x and of a row of W holds as integers, exactly, and apply the two scales to the sum. Groups
other than 32, 64 and multiples of 128, and devices other than CPUs, take the equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.int4 import check_int4_linear
from fxopt.kernels.int8_linear import check_weight_only
from fxopt.kernels.native import on_cpu

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("round_groups(Tensor x, int group) -> Tensor")
_INT8 = "int8_grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor"
_INT4 = (
    "int4_grouped_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, "
    "Tensor? zero_point=None) -> Tensor"
)

ops = torch.ops.fxopt


def round_groups(x: Tensor, group: int) -> Tensor:
    """`x` `[..., K]` with each `group` columns of a row rounded to int8, in its own dtype.

    The scale of a group is its largest magnitude over 127. One that holds NaN or infinity comes
    back with nothing finite. No gradient passes: rounding has none. Raises `KernelError` where
    `group` doesn't divide K and where `x` isn't of floating point.
    """
    if not x.is_floating_point() or x.dim() < 1 or group < 1 or x.shape[-1] % group:
        raise KernelError(
            "round_groups needs a floating-point tensor [..., K] and a group that divides K, not "
            f"{x.dtype} of {tuple(x.shape)} and {group}"
        )
    q, scale = ops.quantize_per_token(x.unflatten(-1, (x.shape[-1] // group, group)))
    rounded: Tensor = ops.dequantize(q, scale, x.dtype)
    return rounded.flatten(-2)


def type_of_rounded(x: Tensor, group: int) -> Tensor:
    """An empty tensor of the kind that `round_groups(x, group)` gives."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_weight_only(x, weight, weight_scale, "int8_grouped_linear")
    rounded = round_groups(x, _group(weight.shape[1], weight.shape[0], weight_scale))
    y: Tensor = ops.int8_weight_only_linear(rounded, weight, weight_scale, bias)
    return y


def _int4(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, zero_point: Tensor | None = None
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point, "int4_grouped_linear")
    rounded = round_groups(x, _group(2 * packed.shape[1], packed.shape[0], scale))
    y: Tensor = ops.int4_weight_only_linear(rounded, packed, scale, bias, zero_point)
    return y


def _group(inner: int, rows: int, scale: Tensor) -> int:
    return inner // max(1, scale.numel() // max(1, rows))


def _int8_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_weight_only(x, weight, weight_scale, "int8_grouped_linear")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _int4_fake(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, zero_point: Tensor | None = None
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point, "int4_grouped_linear")
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the bias alone, the fourth input: the rounded x passes none on."""
    wants_bias = ctx.needs_input_grad[3]
    found = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return (None, None, None, found, None)[: ctx.inputs]


_library.impl("round_groups", round_groups, "CompositeImplicitAutograd")
for _schema, _definition, _fake in ((_INT8, _int8, _int8_fake), (_INT4, _int4, _int4_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _definition, "CompositeExplicitAutograd")
    on_cpu(_schema, _definition, "decoding")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"fxopt::{_name}", _backward, setup_context=_save, lib=_library)
