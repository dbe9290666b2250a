"""The fxopt operators in ONNX's, with quantization in the form that ONNX Runtime fuses.

    quantize(x, s, z)               QuantizeLinear(x, s, z)
    dequantize(W, s [N, 1])         DequantizeLinear(W, s [N], axis=0)
    dequantize(W, s [N, G, 1])      DequantizeLinear(W, s, axis=2, block_size=g)     from opset 21
    dequantize(q, s [..., 1])       Mul(Sub(Cast(q), Cast(z)), s)                    one s a token
    dequantize(q, s, z float)       the same: a zero point between two steps
    half_weight_only_linear(x, W)   MatMul(x, Transpose(Cast(W)))
    quantize_per_token(x)           Clip(Round(Mul(x, Reciprocal(s)))),  s = Max(Abs(x)) / 127
    round_groups(x, g)              the same of x [..., K / g, g], and back

ONNX has no operator that takes a scale per token; those are written out, in the order of
operations of the definitions, so that both round alike. Source: the ONNX operator documentation,
QuantizeLinear-21 and DequantizeLinear-21.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.export.placement import Placement, Sizes, place

_LARGEST, _LOW, _STEPS = 127.0, -128.0, 255.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_BLOCKS_SINCE = 21


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """{operator: function that emits its ONNX nodes}, as `torch.onnx.export` takes it."""
    emitter = _Emitter(opset)
    ops = torch.ops.fxopt
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        ops.quantize.default: emitter.quantize,
        ops.quantize_per_token.default: emitter.quantize_per_token,
        ops.quantize_per_token_affine.default: emitter.quantize_per_token_affine,
        ops.round_groups.default: emitter.round_groups,
        ops.dequantize.default: emitter.dequantize,
        ops.gelu.default: emitter.gelu,
        ops.half_weight_only_linear.default: emitter.half_weight_only_linear,
    }
    return {target: _function(method) for target, method in table.items()}


class _Emitter:
    """Emits nodes of one opset. Values are `onnxscript.ir.Value`s with shapes where known."""

    def __init__(self, opset: int) -> None:
        import onnxscript
        from onnxscript import ir

        self.op: Any = getattr(onnxscript, f"opset{opset}")
        self.opset = opset
        self.float, self.double = ir.DataType.FLOAT, ir.DataType.DOUBLE
        self.int8, self.uint8 = ir.DataType.INT8, ir.DataType.UINT8

    def gelu(self, x: Any) -> Any:
        return self.op.Gelu(x)

    def half_weight_only_linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        dense = self.op.Transpose(self.op.Cast(weight, to=x.dtype), perm=[1, 0])
        y = self.op.MatMul(x, dense)
        return y if bias is None else self.op.Add(y, bias)

    def quantize(self, x: Any, scale: Any, zero_point: Any) -> Any:
        wide = self._cast(x, self.float)
        placed = self._place(x, scale, zero_point)
        if placed is None or placed.kind == "blocks":
            return self._quantize_written_out(wide, scale, zero_point)
        flat = (self._flat(value, placed) for value in (scale, zero_point))
        return self.op.QuantizeLinear(wide, *flat, axis=placed.axis)

    def quantize_per_token(self, x: Any) -> tuple[Any, Any]:
        op = self.op
        rows, last = self._cast(x, self.float), op.Constant(value_ints=[-1])
        largest = op.ReduceMax(op.Abs(rows), last, keepdims=1)
        scale = op.Max(op.Div(largest, _number(op, _LARGEST)), _number(op, _SMALLEST_SCALE))
        q = op.Round(op.Mul(rows, op.Reciprocal(scale)))
        return self._saturate(q, -_LARGEST, _LARGEST, self.int8), scale

    def round_groups(self, x: Any, group: int) -> Any:
        op, ahead, inner = self.op, [0] * (len(x.shape) - 1), x.shape[-1]
        grouped = op.Reshape(x, op.Constant(value_ints=[*ahead, inner // group, group]))
        q, scale = self.quantize_per_token(grouped)
        rounded = self._dequantize_written_out(q, scale, x.dtype, None)
        return op.Reshape(rounded, op.Constant(value_ints=[*ahead, inner]))

    def quantize_per_token_affine(self, x: Any) -> tuple[Any, Any, Any]:
        op = self.op
        rows, last = self._cast(x, self.float), op.Constant(value_ints=[-1])
        low = op.Min(op.ReduceMin(rows, last, keepdims=1), _number(op, 0.0))
        high = op.Max(op.ReduceMax(rows, last, keepdims=1), _number(op, 0.0))
        half = _number(op, 2.0)
        width = op.Sub(op.Div(high, half), op.Div(low, half))
        scale = op.Max(op.Div(width, _number(op, _STEPS / 2)), _number(op, _SMALLEST_SCALE))
        shift = op.Round(op.Sub(_number(op, _LOW), op.Div(low, scale)))
        zero_point = op.Clip(shift, _number(op, _LOW), _number(op, _LARGEST))
        q = op.Add(op.Round(op.Mul(rows, op.Reciprocal(scale))), zero_point)
        q = self._saturate(q, _LOW, _LARGEST, self.int8)
        return q, scale, op.Cast(zero_point, to=self.int8)

    def dequantize(self, q: Any, scale: Any, dtype: Any, zero_point: Any = None) -> Any:
        placed = self._place(q, scale, zero_point)
        between = zero_point is not None and zero_point.dtype != q.dtype
        too_old = placed and placed.kind == "blocks" and self.opset < _BLOCKS_SINCE
        if placed is None or too_old or between or dtype == self.double:
            return self._dequantize_written_out(q, scale, dtype, zero_point)
        flat = (self._flat(value, placed) for value in (scale, zero_point) if value is not None)
        blocks = {"block_size": placed.block} if placed.block else {}
        y = self.op.DequantizeLinear(q, *flat, axis=placed.axis, **blocks)
        return y if dtype == self.float else self.op.Cast(y, to=dtype)

    def _quantize_written_out(self, x: Any, scale: Any, zero_point: Any) -> Any:
        op = self.op
        rounded = op.Round(op.Mul(x, op.Reciprocal(scale)))
        q = op.Add(rounded, op.Cast(zero_point, to=self.float))
        low, high = (0.0, 255.0) if zero_point.dtype == self.uint8 else (_LOW, _LARGEST)
        return self._saturate(q, low, high, zero_point.dtype)

    def _dequantize_written_out(self, q: Any, scale: Any, dtype: Any, zero_point: Any) -> Any:
        op, wide = self.op, self.double if dtype == self.double else self.float
        y = op.Cast(q, to=wide)
        if zero_point is not None:
            y = op.Sub(y, op.Cast(zero_point, to=wide))
        y = op.Mul(y, self._cast(scale, wide))
        return y if dtype == wide else op.Cast(y, to=dtype)

    def _saturate(self, q: Any, low: float, high: float, dtype: Any) -> Any:
        op = self.op
        return op.Cast(op.Clip(q, _number(op, low), _number(op, high)), to=dtype)

    def _place(self, value: Any, scale: Any, zero_point: Any) -> Placement | None:
        """None too where the scale is computed for each call, unless it is one number."""
        sizes = _sizes(scale)
        if sizes is None or (zero_point is not None and _sizes(zero_point) != sizes):
            return None
        placed = place(_sizes(value) or (), sizes)
        constant = scale.producer() is None
        return placed if placed and (constant or placed.kind == "tensor") else None

    def _flat(self, value: Any, placed: Placement) -> Any:
        """A scale or zero point in the rank that ONNX wants."""
        if placed.kind == "tensor" and len(value.shape) > 0:
            return self.op.Squeeze(value)
        if placed.kind == "axis" and len(value.shape) > 1:
            return self.op.Reshape(value, self.op.Constant(value_ints=[-1]))
        return value

    def _cast(self, value: Any, dtype: Any) -> Any:
        return value if value.dtype == dtype else self.op.Cast(value, to=dtype)


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function of its own: the exporter notes a signature on what it is given."""

    @functools.wraps(method)
    def emit(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return emit


def _number(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def _sizes(value: Any) -> Sizes | None:
    if value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)
