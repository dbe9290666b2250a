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

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn_int8 import no_zero_points, packed_exactly
from fxopt.kernels.packed_linear import ONEDNN_POST_OPS, activate

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


def _check(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    post_op: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> None:
    name = "packed_int8_linear"
    if q.dtype not in (torch.uint8, torch.int8) or weight.dtype != torch.int8:
        raise KernelError(f"{name} needs 8-bit q and int8 weight, not {q.dtype}, {weight.dtype}")
    if weight.dim() != 2 or q.dim() < 1 or q.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"{name} needs q [..., K] and weight [N, K], not {tuple(q.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if scale.numel() != 1 or zero_point.numel() != 1 or weight_scale.numel() != weight.shape[0]:
        raise KernelError(
            f"{name} needs one scale, one zero point and {weight.shape[0]} weight scales, not "
            f"{scale.numel()}, {zero_point.numel()} and {weight_scale.numel()}"
        )
    if post_op not in POST_OPS:
        raise KernelError(f"{name} has no post_op {post_op!r}; one of {sorted(POST_OPS)}")
    if (out_scale is None) != (out_zero_point is None):
        raise KernelError(f"{name} takes out_scale and out_zero_point together")
    if dtype != (torch.float32 if out_zero_point is None else out_zero_point.dtype):
        allowed = (torch.float32, torch.bfloat16) if out_zero_point is None else ()
        if dtype not in allowed:
            raise KernelError(
                f"{name} gives float32, bfloat16 or its output zero point's dtype, not {dtype}"
            )


def _reference(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    post_op: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check(q, scale, zero_point, weight, weight_scale, post_op, out_scale, out_zero_point, dtype)
    signed = q if q.dtype == torch.int8 else (q.to(torch.int16) - 128).to(torch.int8)
    zero = zero_point.to(torch.int32) - (0 if q.dtype == torch.int8 else 128)
    sums = weight.sum(-1, dtype=torch.int32)
    product = torch.ops.fxopt.int8_product(signed, weight) - zero.reshape(()) * sums
    y = product.to(torch.float32) * (scale.reshape(()) * weight_scale.reshape(-1))
    y = activate(y if bias is None else y + bias.to(torch.float32), post_op, None)
    if out_scale is None:
        return y.to(dtype)
    quantized: Tensor = torch.ops.fxopt.quantize(y, out_scale, out_zero_point)
    return quantized


def _on_cpu(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    post_op: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check(q, scale, zero_point, weight, weight_scale, post_op, out_scale, out_zero_point, dtype)
    packed = packed_exactly(weight) if _runs_on_onednn(q, out_zero_point) else None
    if packed is None:
        return _reference(
            q, scale, zero_point, weight, weight_scale, bias, post_op,
            out_scale, out_zero_point, dtype,
        )  # fmt: skip
    attribute, algorithm = ONEDNN_POST_OPS[post_op]
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q.contiguous(),
        scale.item(),
        zero_point.item(),
        packed,
        weight_scale.reshape(-1),
        no_zero_points(weight.shape[0]),
        None if bias is None else bias.to(torch.float32).contiguous(),
        1.0 if out_scale is None else out_scale.item(),
        0 if out_zero_point is None else out_zero_point.item(),
        dtype,
        attribute,
        [],
        algorithm or "",
    )
    return y


def _runs_on_onednn(q: Tensor, out_zero_point: Tensor | None) -> bool:
    unsigned_out = out_zero_point is None or out_zero_point.dtype == torch.uint8
    return q.dtype == torch.uint8 and q.numel() > 0 and unsigned_out


def _fake(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    post_op: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check(q, scale, zero_point, weight, weight_scale, post_op, out_scale, out_zero_point, dtype)
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


_library.impl("shift_to_unsigned", shift_to_unsigned, "CompositeImplicitAutograd")
_library.impl("packed_int8_linear", _reference, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu)
torch.library.register_fake("fxopt::packed_int8_linear", _fake, lib=_library)
