"""Linear layers in 8-bit floating point (e4m3: 4 exponent bits, 3 of mantissa, largest 448).

    quantize_float8(x)  =  (q, s)                     s = max|row| / 448,  q = e4m3(x / s)
    float8_linear(q, s, W, t, b)  =  (q @ Wᵀ) * (s · tᵀ) + b

The relative error of a number is at most 2⁻⁴ whatever its size down to max|row| / 28 672, where
int8's grows as 1/|x|; the sum runs in float32. On CUDA the product is cuBLASLt's or CUTLASS's
(`torch._scaled_mm`); elsewhere, and below capability 8.9, it is this equation in aten.
Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.device import Device
from fxopt.errors import KernelError
from fxopt.kernels.product_shapes import check_product
from fxopt.kernels.quantization import quantize_matrix, row_scale

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
# torch._scaled_mm wants K and N divisible by it.
_MULTIPLE = 16

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("quantize_float8(Tensor x) -> (Tensor, Tensor)")
_library.define(
    "float8_linear(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)


def quantize_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn of the shape of `x`, and float32 scales `[..., 1]`, one a row of the last axis.

    A row of zeros comes back as exact zeros. A row that holds NaN or infinity gets a scale that is
    not finite, so nothing computed from it is. No gradient passes: rounding has none.
    """
    if not x.is_floating_point():
        raise KernelError(f"quantize_float8 needs a floating-point tensor, not {x.dtype}")
    return _rounded(x.detach().to(torch.float32))


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = row_scale(rows, _LARGEST)
    # The cast itself doesn't saturate: past 464 it gives NaN.
    return (rows * scale.reciprocal()).clamp(-_LARGEST, _LARGEST).to(FLOAT8), scale


def type_of_quantized_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors of the kind that `quantize_float8(x)` gives."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x, dtype=FLOAT8), scale


def quantize_weight_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn `[N, K]` and float32 scales `[N, 1]` of a weight `[N, K]`, a scale per channel.

    Beyond the result it needs about 1 MB whatever the weight's size. Raises `KernelError` for a
    weight that is not a matrix of finite floating-point numbers.
    """
    hint = "leave this layer in floating point"
    return quantize_matrix(weight, FLOAT8, _rounded, "quantize_weight_float8", hint)


def _check(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    if q.dtype != FLOAT8 or weight.dtype != FLOAT8:
        raise KernelError(
            f"float8_linear needs float8_e4m3fn on both sides, not {q.dtype}, {weight.dtype}"
        )
    check_product("float8_linear", q, weight)
    if scale.shape != (*q.shape[:-1], 1) or weight_scale.numel() != weight.shape[0]:
        raise KernelError(
            f"float8_linear needs a scale for each row of {tuple(q.shape)} and of "
            f"{tuple(weight.shape)}, not {tuple(scale.shape)} and {tuple(weight_scale.shape)}"
        )


def _scaled(
    product: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = product * weight_scale.reshape(-1).to(product.dtype) * scale.to(product.dtype)
    return (y if bias is None else y + bias.to(product.dtype)).to(dtype)


def _reference(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check(q, scale, weight, weight_scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = torch.nn.functional.linear(q.to(wide), weight.to(wide))
    return _scaled(product, scale, weight_scale, bias, dtype)


def _on_cuda(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    empty = not q.numel() or not weight.numel()
    if empty or dtype == torch.float64 or not Device.describe(q.device).accelerates(FLOAT8):
        return _reference(q, scale, weight, weight_scale, bias, dtype)
    _check(q, scale, weight, weight_scale)
    return _by_scaled_mm(q, scale, weight, weight_scale, bias, dtype)


def _by_scaled_mm(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    shape = (*q.shape[:-1], weight.shape[0])
    rows, columns = _padded(q), _padded(weight, both=True)
    if dtype == torch.bfloat16:
        y = _scaled_by_row(rows, scale, columns, weight_scale, bias)
        return y[:, : shape[-1]].reshape(shape).contiguous()
    # The kernel that scales by row writes bfloat16 only; for more digits, scale after a float32
    # product with scales of one.
    one = scale.new_ones(())
    product = torch._scaled_mm(rows, columns.t(), one, one, out_dtype=torch.float32)
    product = product[:, : shape[-1]].reshape(shape)
    return _scaled(product, scale, weight_scale, bias, dtype).contiguous()


def _scaled_by_row(
    rows: Tensor, scale: Tensor, columns: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    extra = columns.shape[0] - weight_scale.numel()
    pad = torch.nn.functional.pad
    channels = pad(weight_scale.reshape(1, -1).to(torch.float32), (0, extra)).contiguous()
    if bias is not None:
        bias = pad(bias.to(torch.bfloat16), (0, extra)).contiguous()
    # Fast accumulation keeps 14 bits of the sum on Hopper: more than the result holds.
    y: Tensor = torch._scaled_mm(
        rows,
        columns.t(),
        scale.reshape(-1, 1).to(torch.float32).contiguous(),
        channels,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y


def _padded(tensor: Tensor, *, both: bool = False) -> Tensor:
    """`tensor` as contiguous rows with K, and with `both` their number too, filled up with zeros.

    A weight that needs this is padded at every call: lay such a layer out anew, or leave it out.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1])
    inner, rows = -matrix.shape[1] % _MULTIPLE, -matrix.shape[0] % _MULTIPLE if both else 0
    if inner or rows:
        # As bytes: padding isn't defined for every dtype, and zero is zero in this one.
        padded = torch.nn.functional.pad(matrix.view(torch.uint8), (0, inner, 0, rows))
        matrix = padded.view(FLOAT8)
    return matrix.contiguous()


def _fake(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check(q, scale, weight, weight_scale)
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only the bias trains: all else is rounded, or a scale that was found by rounding."""
    db = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return None, None, None, None, db, None


_library.impl("quantize_float8", quantize_float8, "CompositeImplicitAutograd")
_library.impl("float8_linear", _reference, "CompositeExplicitAutograd")
_library.impl("float8_linear", _on_cuda, "CUDA")
torch.library.register_fake("fxopt::float8_linear", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::float8_linear", _backward, setup_context=_save, lib=_library
)
