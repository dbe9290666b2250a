"""Floating-point linear on oneDNN, its weight laid out once, with the next operation fused in.

    packed_linear(x, W, b, post_op, other)  =  post_op(x @ Wᵀ + b)       ("add": x @ Wᵀ + b + other)

aten's float32 linear runs on MKL, which on some CPUs (AMD's) is over twice as slow as oneDNN with a
packed weight; both sum in float32. Off the CPU, in float64 or float16, and wherever oneDNN cannot
run it, the operator is that equation written in aten. It trains.
Source: oneDNN, "Inner Product" and "Primitive Attributes: Post-ops".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn import has_onednn
from fxopt.kernels.packed_weights import PACKED_WEIGHTS
from fxopt.kernels.product_shapes import check_product

# Our name of a post-operation -> the attribute and the algorithm that oneDNN takes for it.
ONEDNN_POST_OPS: dict[str, tuple[str, str | None]] = {
    "none": ("none", None),
    "relu": ("relu", None),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", None),
    "add": ("add", None),
}
POST_OPS: frozenset[str] = frozenset(ONEDNN_POST_OPS)

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, str post_op, Tensor? other) -> Tensor"
)
_library.define(_SCHEMA)


def activate(z: Tensor, post_op: str, other: Tensor | None) -> Tensor:
    """`post_op` applied to `z` in aten; "add" adds `other`."""
    if post_op == "relu":
        return torch.relu(z)
    if post_op == "gelu":
        return torch.nn.functional.gelu(z)
    if post_op == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    if post_op == "silu":
        return torch.nn.functional.silu(z)
    if post_op == "add":
        assert other is not None
        return z + other
    return z


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str, other: Tensor | None
) -> Tensor:
    _check(x, weight, bias, post_op, other)
    return activate(torch.nn.functional.linear(x, weight, bias), post_op, other)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str, other: Tensor | None
) -> None:
    if post_op not in POST_OPS:
        raise KernelError(f"packed_linear has no post_op {post_op!r}; one of {sorted(POST_OPS)}")
    if (post_op == "add") != (other is not None):
        raise KernelError("packed_linear takes `other` with post_op='add', and only then")
    check_product("packed_linear", x, weight)
    if other is not None and other.shape != (*x.shape[:-1], weight.shape[0]):
        raise KernelError(
            f"packed_linear adds an `other` of its result's shape, not {tuple(other.shape)}"
        )
    dtypes = {t.dtype for t in (x, weight, bias, other) if t is not None}
    if len(dtypes) > 1:
        raise KernelError(f"packed_linear needs one dtype for all its tensors, not {dtypes}")


def _runs_on_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() > 0
        and weight.shape[0] > 0
        and has_onednn()
        and not weight.is_inference()
        and (
            x.dtype == torch.float32
            or (x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        )
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str, other: Tensor | None
) -> Tensor:
    if not _runs_on_onednn(x, weight):
        return _reference(x, weight, bias, post_op, other)
    _check(x, weight, bias, post_op, other)
    packed = PACKED_WEIGHTS.get(weight, _pack)
    attribute, algorithm = ONEDNN_POST_OPS[post_op]
    # oneDNN takes a bias of unit stride only and reads a wrong one past its end.
    bias = None if bias is None else bias.contiguous()
    linear = torch.ops.mkldnn._linear_pointwise
    y: Tensor
    if other is not None:
        y = linear.binary(x, other.contiguous(), packed, bias, attribute)
    else:
        y = linear(x, packed, bias, attribute, [], algorithm)
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str, other: Tensor | None
) -> Tensor:
    _check(x, weight, bias, post_op, other)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, post_op, _ = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.post_op = post_op


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dz = _activation_gradient(grad, x, weight, bias, ctx.post_op)
    dx = dz @ weight if ctx.needs_input_grad[0] else None
    rows = dz.reshape(-1, dz.shape[-1])
    dw = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    db = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
    return dx, dw, db, None, grad if ctx.post_op == "add" else None


def _activation_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, post_op: str
) -> Tensor:
    if post_op in ("none", "add"):
        return grad
    z = torch.nn.functional.linear(x, weight, bias)
    dz: Tensor
    if post_op == "relu":
        dz = torch.ops.aten.threshold_backward(grad, z, 0)
    elif post_op == "silu":
        dz = torch.ops.aten.silu_backward(grad, z)
    else:
        algorithm = "tanh" if post_op == "gelu_tanh" else "none"
        dz = torch.ops.aten.gelu_backward(grad, z, approximate=algorithm)
    return dz


_library.impl("packed_linear", _reference, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu)
torch.library.register_fake("fxopt::packed_linear", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::packed_linear", _backward, setup_context=_save, lib=_library
)
