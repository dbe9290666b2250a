"""Linear layers with an int8 weight.

    int8_linear(q, s, W, t, b, z)  =  (q @ Wᵀ - z · ΣW) * (s · tᵀ) + b

for q int8 `[..., K]` with a scale s `[..., 1]` and a zero point z (or none) a token, and W int8
`[N, K]` with a scale t `[N, 1]` per output channel and the sums ΣW `[N]` of its rows:
the scales leave the sum, so the sum is one of integers, exact in int32 up to K = 133 000
(2³¹ / 127²). Only that product is opaque to the compiler; the rest is aten, and Inductor fuses it
with what follows.

    int8_weight_only_linear(x, W, t, b)  =  x @ (W * t)ᵀ + b

for x float `[..., K]` and W with a scale t `[N, 1]` per output channel, or `[N, K/g]` or
`[N, K/g, 1]` for each group of g columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn import dense_linear
from fxopt.kernels.onednn_int8 import product_without_dot_product, takes_full_range
from fxopt.kernels.product_shapes import check_product

# cuBLASLt's int8 product wants more than 16 rows, and K and N divisible by 8.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8
# Up to here aten's bfloat16 kernel multiplies with the int8 weight as it lies, 2 to 9 times as fast
# as dequantizing it first; its float32 and float16 kernels are scalar code and lose at every size.
_FEW_ROWS = 32
# That kernel reads whole vectors: other inner sizes give wrong numbers or crash (seen in 2.13).
_VECTOR = 32

_library = torch.library.Library("fxopt", "FRAGMENT")
_PRODUCT = "int8_product(Tensor q, Tensor weight) -> Tensor"
_library.define(_PRODUCT)
_library.define(
    "int8_linear(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType dtype, Tensor? zero_point=None, Tensor? weight_sums=None) -> Tensor"
)
_WEIGHT_ONLY = (
    "int8_weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor"
)
_library.define(_WEIGHT_ONLY)


def int8_linear(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """`[..., N]` in `dtype` from int8 `q` `[..., K]`, `scale` `[..., 1]`, int8 `weight` `[N, K]`,
    `weight_scale` `[N, 1]` and `bias` `[N]`; scales and bias are applied in float32, or float64 if
    that is `dtype`. `zero_point` int8 `[..., 1]` comes with `weight_sums` int32 `[N]`, the sums of
    the weight's rows."""
    if (zero_point is None) != (weight_sums is None):
        raise KernelError("int8_linear takes zero_point and weight_sums together")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product: Tensor = torch.ops.fxopt.int8_product(q, weight)
    if zero_point is not None and weight_sums is not None:
        product = product - zero_point.to(torch.int32) * weight_sums
    y = product.to(wide) * weight_scale.detach().reshape(-1).to(wide) * scale.detach().to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype)


def _check_product(q: Tensor, weight: Tensor) -> None:
    if q.dtype != torch.int8 or weight.dtype != torch.int8:
        raise KernelError(f"int8_product needs int8 on both sides, not {q.dtype}, {weight.dtype}")
    check_product("int8_product", q, weight)


def _product_fake(q: Tensor, weight: Tensor) -> Tensor:
    _check_product(q, weight)
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=torch.int32)


def _product_on_cpu(q: Tensor, weight: Tensor) -> Tensor:
    _check_product(q, weight)
    shape = (*q.shape[:-1], weight.shape[0])
    if q.numel() == 0 or weight.numel() == 0:
        return q.new_zeros(shape, dtype=torch.int32)
    if q.shape[-1] == 1:
        # torch._int_mm on the CPU returns wrong numbers for an inner size of 1 (seen in 2.13).
        return q.to(torch.int32) * weight.reshape(-1).to(torch.int32)
    rows = q.reshape(-1, q.shape[-1]).contiguous()
    if not takes_full_range():
        # torch._int_mm is a scalar loop there, 25 times as slow as float32.
        return product_without_dot_product(rows, weight).view(shape)
    return torch._int_mm(rows, weight.contiguous().t()).view(shape)


def _product_on_cuda(q: Tensor, weight: Tensor) -> Tensor:
    _check_product(q, weight)
    shape = (*q.shape[:-1], weight.shape[0])
    if q.numel() == 0 or weight.numel() == 0:
        return q.new_zeros(shape, dtype=torch.int32)
    rows = q.reshape(-1, q.shape[-1])
    count, outputs = rows.shape[0], weight.shape[0]
    inner = -rows.shape[1] % _CUDA_MULTIPLE
    pad = torch.nn.functional.pad
    rows = pad(rows, (0, inner, 0, max(0, _CUDA_ROWS - count)))
    columns = pad(weight, (0, inner, 0, -outputs % _CUDA_MULTIPLE))
    y = torch._int_mm(rows.contiguous(), columns.contiguous().t())
    return y[:count, :outputs].reshape(shape).contiguous()


def _dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    check_weight_only(x, weight, weight_scale)
    return torch.nn.functional.linear(x, _dense(weight, weight_scale, x.dtype), bias)


def _dense(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W * t [N, K] in `dtype`."""
    rows, inner = weight.shape
    groups = max(1, weight_scale.numel() // max(1, rows))
    q = weight.reshape(rows, groups, inner // groups)
    scale = weight_scale.reshape(rows, groups, 1)
    dense: Tensor = torch.ops.fxopt.dequantize(q, scale, dtype)
    return dense.reshape(rows, inner)


def check_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, name: str = "int8_weight_only_linear"
) -> None:
    """Raise `KernelError`, from `name`, for what no layer on an int8 weight is."""
    if not x.is_floating_point() or weight.dtype != torch.int8:
        raise KernelError(f"{name} needs float x and int8 weight, not {x.dtype}, {weight.dtype}")
    check_product(name, x, weight)
    rows, inner = weight.shape
    groups = weight_scale.shape[1] if weight_scale.dim() >= 2 else 1
    if weight_scale.numel() != rows * groups or groups < 1 or inner % groups:
        raise KernelError(
            f"{name} needs one scale for each of the weight's {rows} rows, or for "
            f"equal groups of its {inner} columns [N, K/g], not {tuple(weight_scale.shape)}"
        )


def _weight_only_on_cpu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    check_weight_only(x, weight, weight_scale)
    count = x.numel() // max(1, x.shape[-1])
    by_row = weight_scale.numel() == weight.shape[0]
    if x.dtype == torch.bfloat16 and 0 < count <= _FEW_ROWS and by_row and _in_vectors(weight):
        rows, scales = x.reshape(count, -1).contiguous(), weight_scale.reshape(-1).to(x.dtype)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight.contiguous(), scales)
        y = y.view(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias
    return dense_linear(x, _dense(weight, weight_scale, x.dtype), bias)


def _in_vectors(weight: Tensor) -> bool:
    return weight.numel() > 0 and weight.shape[1] % _VECTOR == 0


def _weight_only_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    check_weight_only(x, weight, weight_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, bias = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    dx = grad @ _dense(weight, weight_scale, grad.dtype) if ctx.needs_input_grad[0] else None
    wants_bias = ctx.has_bias and ctx.needs_input_grad[3]
    return dx, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None


_library.impl("int8_linear", int8_linear, "CompositeImplicitAutograd")
on_cpu(_PRODUCT, _product_on_cpu)
_library.impl("int8_product", _product_on_cuda, "CUDA")
torch.library.register_fake("fxopt::int8_product", _product_fake, lib=_library)
_library.impl("int8_weight_only_linear", _dequantized_linear, "CompositeExplicitAutograd")
on_cpu(_WEIGHT_ONLY, _weight_only_on_cpu, "decoding")
torch.library.register_fake("fxopt::int8_weight_only_linear", _weight_only_fake, lib=_library)
torch.library.register_autograd(
    "fxopt::int8_weight_only_linear", _backward, setup_context=_save, lib=_library
)
