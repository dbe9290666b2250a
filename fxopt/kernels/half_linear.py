"""Linear layers whose weight is stored in half precision and multiplied in that of their input.

    half_weight_only_linear(x, W, b)  =  x @ x.dtype(W)ᵀ + b

for x `[..., K]` and W `[N, K]` bfloat16 or float16. Sums are those of a product in the dtype of x.
A weight that was bfloat16 before a model was made float32 loses nothing by it and is read from
memory in half the time, which is what a product of a few rows takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn import dense_linear
from fxopt.kernels.product_shapes import check_product

_HALF = (torch.bfloat16, torch.float16)

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = "half_weight_only_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
_library.define(_SCHEMA)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point() or weight.dtype not in _HALF:
        raise KernelError(
            "half_weight_only_linear needs float x and a bfloat16 or float16 weight, not "
            f"{x.dtype}, {weight.dtype}"
        )
    check_product("half_weight_only_linear", x, weight)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight)
    return dense_linear(x, weight.to(x.dtype), bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    dx = grad @ weight.to(grad.dtype) if needs_x else None
    of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if needs_weight else None
    return dx, of_weight, rows.sum(0) if ctx.has_bias and needs_bias else None


_library.impl("half_weight_only_linear", _reference, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu, "decoding")
torch.library.register_fake("fxopt::half_weight_only_linear", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::half_weight_only_linear", _backward, setup_context=_save, lib=_library
)
