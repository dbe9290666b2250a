"""Quantized products in the form that runtimes have fast kernels for; the numbers stay.

    Gemm(x, dq(W), b, transB)         =  Add(MatMul(x, Transpose(dq(W))), b)
    MatMul(q * s, (W * ws)ᵀ)          =  MatMulInteger(q, Wᵀ) * s * ws                 s a token
    MatMul((q - z) * s, (W * ws)ᵀ)    =  (MatMulInteger(q, Wᵀ) - z * sum(W)) * s * ws
    dq(q(x, s, z int8), s, z)         =  dq(q(x, s, z + 128 uint8), s, z + 128)

ONNX Runtime fuses a MatMul between DequantizeLinear and DequantizeLinear, but not one whose input
has a scale per token: left as floats that product gains nothing (768 to 768, 1024 rows, one thread
with VNNI: 9.1 ms against 8.8 in float32), as integers it takes 2.1 ms. Signed activations
have no kernel on x86 (50 ms), so int8 is shifted to uint8, which is exact.
"""

from __future__ import annotations

from typing import Any

from fxopt.export.unsigned import SHIFT, unsigned_constant


def speed_up_products(model: Any) -> None:
    """Rewrite the quantized products of an `onnxscript.ir.Model` in place."""
    from onnxscript import rewriter
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    rewriter.rewrite(model, RewriteRuleSet([RewriteRule(_gemm, _gemm_as_product, _is_weight)]))
    rules = [
        RewriteRule(_symmetric, _symmetric_as_integers, _is_quantized, remove_nodes=False),
        RewriteRule(_affine, _affine_as_integers, _is_quantized, remove_nodes=False),
    ]
    rewriter.rewrite(model, RewriteRuleSet(rules))
    _make_activations_unsigned(model)


def _gemm(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    return op.Gemm(
        x, op.DequantizeLinear(weight, scale, axis=0), bias, alpha=1.0, beta=1.0, transB=1
    )


def _gemm_as_product(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    columns = _weight_columns(op, weight, scale)
    producer = x.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return op.Add(op.MatMul(x, columns), bias)
    # ONNX Runtime makes a Gemm of a product of two matrices again before it looks for quantized
    # ones, and has no fast kernel for that Gemm; of rank 3 it stays a product.
    product = op.MatMul(op.Unsqueeze(x, op.Constant(value_ints=[0])), columns)
    return op.Add(op.Squeeze(product, op.Constant(value_ints=[0])), bias)


def _weight_columns(op: Any, weight: Any, weight_scale: Any) -> Any:
    return op.Transpose(op.DequantizeLinear(weight, weight_scale, axis=0), perm=[1, 0])


def _symmetric(op: Any, rounded: Any, scale: Any, weight: Any, weight_scale: Any) -> Any:
    x = op.Mul(op.Cast(op.Cast(rounded, to=_INT8), to=_FLOAT), scale)
    return op.MatMul(x, _weight_columns(op, weight, weight_scale))


def _affine(
    op: Any, rounded: Any, zero_point: Any, scale: Any, weight: Any, weight_scale: Any
) -> Any:
    q = op.Cast(op.Cast(rounded, to=_INT8), to=_FLOAT)
    x = op.Mul(op.Sub(q, op.Cast(zero_point, to=_FLOAT)), scale)
    return op.MatMul(x, _weight_columns(op, weight, weight_scale))


def _symmetric_as_integers(
    op: Any, rounded: Any, scale: Any, weight: Any, weight_scale: Any
) -> Any:
    product = op.Cast(_integer_product(op, rounded, weight), to=_FLOAT)
    return op.Mul(op.Mul(product, scale), weight_scale)


def _affine_as_integers(
    op: Any, rounded: Any, zero_point: Any, scale: Any, weight: Any, weight_scale: Any
) -> Any:
    import numpy as np
    from onnxscript import ir

    sums = weight.const_value.numpy().astype(np.int32).sum(1, dtype=np.int32)
    shift = op.Mul(op.Cast(zero_point, to=_INT32), op.Constant(value=ir.tensor(sums)))
    product = op.Cast(op.Sub(_integer_product(op, rounded, weight), shift), to=_FLOAT)
    return op.Mul(op.Mul(product, scale), weight_scale)


def _integer_product(op: Any, rounded: Any, weight: Any) -> Any:
    """q @ Wᵀ in int32 from the rounded floats, which lie in [-128, 127]."""
    import numpy as np
    from onnxscript import ir

    unsigned = op.Add(rounded, op.Constant(value=ir.tensor(np.float32(SHIFT))))
    zero_point = op.Constant(value=ir.tensor(np.uint8(SHIFT)))
    q = op.Cast(unsigned, to=_UINT8)
    return op.MatMulInteger(q, op.Transpose(weight, perm=[1, 0]), zero_point)


_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6
"""Data types as the ONNX format numbers them."""


def _is_weight(context: Any, weight: Any, scale: Any, **_: Any) -> bool:
    return weight.const_value is not None and len(scale.shape or ()) == 1


def _is_quantized(context: Any, rounded: Any, weight: Any, weight_scale: Any, **_: Any) -> bool:
    clipped = rounded.producer() is not None and rounded.producer().op_type == "Clip"
    int8 = weight.dtype is not None and int(weight.dtype) == _INT8
    return clipped and int8 and _is_weight(context, weight, weight_scale)


def _make_activations_unsigned(model: Any) -> None:
    """Shift int8 activations between QuantizeLinear and DequantizeLinear to uint8."""
    from onnxscript import ir

    for node in [*model.graph]:
        if node.op_type != "QuantizeLinear":
            continue
        users = [user for user, _ in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not _all_dequantize(users, node):
            continue
        given = node.inputs[2]
        values = given.const_value.numpy()
        zero_point = unsigned_constant(model, f"{given.name}_uint8", values)
        for one in (node, *users):
            one.replace_input_with(2, zero_point)
        node.outputs[0].dtype = ir.DataType.UINT8


def _all_dequantize(users: list[Any], quantize: Any) -> bool:
    zero_point = quantize.inputs[2]
    signed = zero_point.const_value is not None and int(zero_point.dtype) == _INT8
    return signed and all(
        user.op_type == "DequantizeLinear"
        and len(user.inputs) == 3
        and _same_constant(user.inputs[2], zero_point)
        for user in users
    )


def _same_constant(one: Any, other: Any) -> bool:
    import numpy as np

    if one is other:
        return True
    if one is None or one.const_value is None:
        return False
    return bool(np.array_equal(one.const_value.numpy(), other.const_value.numpy()))
