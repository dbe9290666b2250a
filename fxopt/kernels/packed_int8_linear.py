"""Linear on oneDNN with int8 on both sides, scales given, and everything around it inside.

    y  =  f((q - z) @ Wᵀ * (s · t) + b)                                   in `dtype`, or
    quantize(y, out_scale, out_zero_point)                                where these are given

for q 8-bit `[..., K]` with one scale s and zero point z, and W int8 `[N, K]` with a scale t
`[N, 1]` per output channel. With an output scale the next layer's integers leave the product's
epilogue, and no float lies between two layers. The sum is exact in int32; the epilogue is float32.

Off the CPU, and where oneDNN's sum would not be exact (`fxopt.kernels.onednn_int8`), the operator
is the equation. Inference only: rounding has no gradient.
Source: oneDNN, "Quantization" and "Primitive Attributes: Post-ops".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn_int8 import no_zero_points, packed_exactly
from fxopt.kernels.packed_linear import ONEDNN_POST_OPS, activate
from fxopt.kernels.product_shapes import check_product

POST_OPS = frozenset(ONEDNN_POST_OPS) - {"add"}

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "packed_int8_linear(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, "
    "Tensor weight_scale, Tensor? bias, str post_op, Tensor? out_scale, Tensor? out_zero_point, "
    "ScalarType dtype) -> Tensor"
)
_library.define(_SCHEMA)
_library.define("shift_to_unsigned(Tensor q) -> Tensor")


def shift_to_unsigned(q: Tensor) -> Tensor:
    """uint8 `q + 128` of int8 `q`: oneDNN's fast products take unsigned activations."""
    return (q.to(torch.int16) + 128).to(torch.uint8)


class Call(NamedTuple):
    """The arguments of one call, in the operator's order.

    `q` uint8 or int8 `[..., K]`; `scale` and `zero_point` one number; `weight` int8 `[N, K]`;
    `weight_scale` `[N, 1]` and `bias` `[N]`; `post_op`, one of `POST_OPS`; `out_scale` and
    `out_zero_point` one number; the result's `dtype`.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    post_op: str
    out_scale: Tensor | None
    out_zero_point: Tensor | None
    dtype: torch.dtype

    def checked(self) -> Call:
        """This call; raises `KernelError` where shapes or dtypes don't fit."""
        name, (q, scale, zero_point, weight, weight_scale, *_) = "packed_int8_linear", self
        if q.dtype not in (torch.uint8, torch.int8) or weight.dtype != torch.int8:
            raise KernelError(
                f"{name} needs 8-bit q and int8 weight, not {q.dtype}, {weight.dtype}"
            )
        check_product(name, q, weight)
        rows = weight.shape[0]
        if scale.numel() != 1 or zero_point.numel() != 1 or weight_scale.numel() != rows:
            raise KernelError(
                f"{name} needs one scale, one zero point and {rows} weight scales, not "
                f"{scale.numel()}, {zero_point.numel()} and {weight_scale.numel()}"
            )
        if self.post_op not in POST_OPS:
            raise KernelError(f"{name} has no post_op {self.post_op!r}; one of {sorted(POST_OPS)}")
        if (self.out_scale is None) != (self.out_zero_point is None):
            raise KernelError(f"{name} takes out_scale and out_zero_point together")
        out = self.out_zero_point
        if self.dtype not in ((torch.float32, torch.bfloat16) if out is None else (out.dtype,)):
            raise KernelError(
                f"{name} gives float32, bfloat16 or its output zero point's dtype, not {self.dtype}"
            )
        return self

    def runs_on_onednn(self) -> bool:
        """Whether oneDNN takes these dtypes."""
        unsigned = self.out_zero_point is None or self.out_zero_point.dtype == torch.uint8
        return self.q.dtype == torch.uint8 and self.q.numel() > 0 and unsigned


def _reference(*given: Any) -> Tensor:
    call = Call(*given).checked()
    is_signed = call.q.dtype == torch.int8
    signed = call.q if is_signed else (call.q.to(torch.int16) - 128).to(torch.int8)
    zero = call.zero_point.to(torch.int32) - (0 if is_signed else 128)
    sums = call.weight.sum(-1, dtype=torch.int32)
    product = torch.ops.fxopt.int8_product(signed, call.weight) - zero.reshape(()) * sums
    y = product.to(torch.float32) * (call.scale.reshape(()) * call.weight_scale.reshape(-1))
    y = activate(y if call.bias is None else y + call.bias.to(torch.float32), call.post_op, None)
    if call.out_scale is None:
        return y.to(call.dtype)
    quantized: Tensor = torch.ops.fxopt.quantize(y, call.out_scale, call.out_zero_point)
    return quantized


def _on_cpu(*given: Any) -> Tensor:
    call = Call(*given).checked()
    packed = packed_exactly(call.weight) if call.runs_on_onednn() else None
    if packed is None:
        return _reference(*given)
    attribute, algorithm = ONEDNN_POST_OPS[call.post_op]
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        call.q.contiguous(),
        call.scale.item(),
        call.zero_point.item(),
        packed,
        call.weight_scale.reshape(-1),
        no_zero_points(call.weight.shape[0]),
        None if call.bias is None else call.bias.to(torch.float32).contiguous(),
        1.0 if call.out_scale is None else call.out_scale.item(),
        0 if call.out_zero_point is None else call.out_zero_point.item(),
        call.dtype,
        attribute,
        [],
        algorithm or "",
    )
    return y


def _fake(*given: Any, **named: Any) -> Tensor:
    call = Call(*given, **named).checked()
    return call.q.new_empty((*call.q.shape[:-1], call.weight.shape[0]), dtype=call.dtype)


_library.impl("shift_to_unsigned", shift_to_unsigned, "CompositeImplicitAutograd")
_library.impl("packed_int8_linear", _reference, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu)
torch.library.register_fake("fxopt::packed_int8_linear", _fake, lib=_library)
