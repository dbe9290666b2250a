"""The `fxopt::` operators that a rewritten graph may call.

Numerics level: where values are rounded. Device-free, written in aten, and traced through by
torch.compile, so that Inductor fuses them with their neighbours.

    quantize_per_token(x) -> (q, scale)                      int8 rows, one float32 scale each
    quantize_per_token_affine(x) -> (q, scale, zero_point)   the same with a zero point each
    quantize(x, scale, zero_point) -> q                      with a given scale and zero point
    quantize_float8(x) -> (q, scale)                         float8 (e4m3) rows, one scale each
    dequantize(q, scale, dtype, zero_point) -> x             (q - zero_point) * scale
    unpack_int4(packed) -> q                                 int8 from two values a byte
    round_groups(x, group) -> x                              each group of columns by int8 and back
    gelu(x)                                      with a rational erf, which the compiler fuses
    written_attention(q, k, v, bias, is_causal, scale)       written out, for the compiler to fuse
    layer_norm(x, weight, bias, eps)                         in two passes, for the same

Kernel level: which library does it on this device. A graph-level pass puts them in the place of
numerics-level regions; each call ends up as one call of a library, opaque to the compiler. On a CPU
with AVX-512 nine of them, marked *, are compiled for it instead (`native`), and those marked + on
one with AVX2 or AVX-512.

    int8_linear(q, scale, weight, weight_scale, bias, ...)       exact int32 product, then scales
    int8_product(q, weight)                                      that product alone *
    int8_linear_fused(q, scale, zero_point, weight, weight_scale, weight_sums, bias, dtype, post_op)
                                                                 one Triton kernel on CUDA *
    float8_linear(q, scale, weight, weight_scale, bias, dtype)   torch._scaled_mm on CUDA
    int8_weight_only_linear(x, weight, weight_scale, bias)       float activations, int8 weight +
    int4_weight_only_linear(x, packed, scale, bias)              int4 weight, groups of columns +
    int8_grouped_linear(x, weight, weight_scale, bias)           both in int8 by groups of columns +
    int4_grouped_linear(x, packed, scale, bias, zero_point)      the same, the weight in int4 +
    half_weight_only_linear(x, weight, bias)                     float32 activations, half weight +
    linear_sparse24(x, values, places, bias)                     2:4 weights, sparse tensor cores
    quantize_tokens(x, factor, shift, affine)                    int8 rows of x * factor - shift *
    packed_int8_linear(q, scale, zero_point, weight, ...)        oneDNN, epilogue, requantization *
    packed_int8_linear_tokens(..., post_op, affine)              int8 rows of its float32 result *
    int8_linear_fused_tokens(..., post_op, affine)               int8 rows of its float32 result *
    packed_linear(x, weight, bias, post_op, other)               oneDNN, weight laid out once *
    attention_bias(mask)                                         a mask as floats, computed once
    attention(q, k, v, mask, is_causal, scale)                   oneDNN, both products grouped *
    cached_attention(q, k, v, past_k, past_v, ...)               new positions to a filled prefix +
    int8_cached_attention(q, k, v, past_k, past_v, ...)          the same, the prefix in int8 +
    quantized_attention(..., out_scale, out_zero_point)          the same as 8-bit codes *

`KERNEL_LEVEL` holds the operators that a lowering must account for, and `GENERATED_AS` the names by
which each is found in generated code. `SHAPE_RULES` gives, for operators that are slow to trace,
functions that return empty tensors of the kind of their results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.device import Answer, Device
from fxopt.kernels import (
    append_slots,
    attention,
    cached_attention,
    execution,
    float8,
    gelu,
    grouped_linear,
    half_linear,
    int4,
    int8_cached_attention,
    int8_linear,
    int8_linear_fused,
    layer_norm,
    matrix_power,
    native,
    packed_int8_linear,
    packed_linear,
    quantization,
    quantize_tokens,
    recurrent,
    sparse24,
    written_attention,
)
from fxopt.kernels.int4 import pack_int4
from fxopt.kernels.onednn import has_onednn
from fxopt.kernels.onednn_int8 import takes_full_range
from fxopt.kernels.packed_linear import POST_OPS
from fxopt.kernels.packed_weights import PACKED_WEIGHTS
from fxopt.kernels.quantization import quantize_weight

NUMERICS_LEVEL: frozenset[OpOverload] = frozenset(
    {
        torch.ops.fxopt.quantize_per_token.default,
        torch.ops.fxopt.quantize_per_token_affine.default,
        torch.ops.fxopt.quantize.default,
        torch.ops.fxopt.quantize_float8.default,
        torch.ops.fxopt.dequantize.default,
        torch.ops.fxopt.unpack_int4.default,
        torch.ops.fxopt.round_groups.default,
    }
)

SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    torch.ops.fxopt.quantize_per_token.default: quantization.type_of_quantized,
    torch.ops.fxopt.quantize_per_token_affine.default: quantization.type_of_quantized_affine,
    torch.ops.fxopt.quantize_float8.default: float8.type_of_quantized_float8,
    torch.ops.fxopt.round_groups.default: grouped_linear.type_of_rounded,
    torch.ops.aten.lstm.input: recurrent.type_of_lstm,
    torch.ops.aten.gru.input: recurrent.type_of_gru,
    torch.ops.aten.rnn_tanh.input: recurrent.type_of_rnn,
    torch.ops.aten.rnn_relu.input: recurrent.type_of_rnn,
    torch.ops.aten.linalg_matrix_power.default: matrix_power.type_of_matrix_power,
    torch.ops.aten.matrix_power.default: matrix_power.type_of_matrix_power,
}

GENERATED_AS: dict[OpOverload, str] = {
    torch.ops.fxopt.int8_linear.default: "fxopt.int8_product",
    torch.ops.fxopt.int8_product.default: "fxopt.int8_product",
    torch.ops.fxopt.int8_linear_fused.default: "fxopt.int8_linear_fused",
    torch.ops.fxopt.float8_linear.default: "fxopt.float8_linear",
    torch.ops.fxopt.int8_weight_only_linear.default: "fxopt.int8_weight_only_linear",
    torch.ops.fxopt.int4_weight_only_linear.default: "fxopt.int4_weight_only_linear",
    torch.ops.fxopt.int8_grouped_linear.default: "fxopt.int8_grouped_linear",
    torch.ops.fxopt.int4_grouped_linear.default: "fxopt.int4_grouped_linear",
    torch.ops.fxopt.half_weight_only_linear.default: "fxopt.half_weight_only_linear",
    torch.ops.fxopt.linear_sparse24.default: "fxopt.linear_sparse24",
    torch.ops.fxopt.quantize_tokens.default: "fxopt.quantize_tokens",
    torch.ops.fxopt.packed_int8_linear.default: "fxopt.packed_int8_linear",
    torch.ops.fxopt.packed_int8_linear_tokens.default: "fxopt.packed_int8_linear_tokens",
    torch.ops.fxopt.int8_linear_fused_tokens.default: "fxopt.int8_linear_fused_tokens",
    torch.ops.fxopt.packed_linear.default: "fxopt.packed_linear",
    torch.ops.fxopt.attention.default: "fxopt.attention",
    torch.ops.fxopt.cached_attention.default: "fxopt.cached_attention",
    torch.ops.fxopt.int8_cached_attention.default: "fxopt.int8_cached_attention",
    torch.ops.fxopt.quantized_attention.default: "fxopt.quantized_attention",
    torch.ops.fxopt.attention_bias.default: "fxopt.attention_bias",
}

KERNEL_LEVEL: frozenset[OpOverload] = frozenset(GENERATED_AS)


def saturates(device: torch.device) -> bool:
    """Whether no fast product of 8-bit activations with weights of all 8 bits is exact there: on a
    CPU without an int8 dot product. With weights of 7 bits there is one: `multiplies_int8`."""
    return device.type == "cpu" and not takes_full_range() and not native.load()


def multiplies_int8(device: Device) -> Answer:
    """Whether a product of 8-bit activations with weights of 8 or 7 bits can outrun float32's
    there, and why: by an instruction for it, or on any CPU by oneDNN, which needs none for 7."""
    native = device.accelerates(torch.int8)
    if native or device.kind != "cpu" or not has_onednn():
        return native
    return Answer(True, f"oneDNN multiplies int8 weights of 7 bits exactly on {device.name}")


__all__ = [
    "GENERATED_AS",
    "KERNEL_LEVEL",
    "NUMERICS_LEVEL",
    "PACKED_WEIGHTS",
    "POST_OPS",
    "SHAPE_RULES",
    "append_slots",
    "attention",
    "cached_attention",
    "execution",
    "float8",
    "gelu",
    "grouped_linear",
    "half_linear",
    "int4",
    "int8_cached_attention",
    "int8_linear",
    "int8_linear_fused",
    "layer_norm",
    "multiplies_int8",
    "native",
    "pack_int4",
    "packed_int8_linear",
    "packed_linear",
    "quantization",
    "quantize_tokens",
    "quantize_weight",
    "saturates",
    "sparse24",
    "takes_full_range",
    "written_attention",
]
