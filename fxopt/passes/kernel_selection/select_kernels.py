"""SelectKernels: quantize / dequantize regions become fused int8 operators.

    linear(dq(q, s), dq(Wq, Ws), b)            =  int8_linear(q, s, Wq, Ws, b)             per token
    linear(dq(q, s, z), dq(Wq, Ws), b)         =  int8_linear(q, s, Wq, Ws, b, z, ΣWq)     affine
    linear(dq(q, s, z), dq(Wq, Ws), b)         =  packed_int8_linear(q, s, z, Wq, Ws, b)   given
    linear(x, dq(Wq, Ws), b)                   =  int8_weight_only_linear(x, Wq, Ws, b)
    linear(x, view(dq(view(Wq), Ws)), b)       =  int8_weight_only_linear(x, Wq, Ws, b)    groups
    linear(round_groups(x), view(dq(...)), b)  =  int8_grouped_linear(x, Wq, Ws, b)
    linear(x, W, b)                            =  linear_sparse24(x, V, P, b)   2:4 W, on CUDA
    int8_linear(...)                           =  int8_linear_fused(...)       if one kernel can
    quantize_per_token(x · m - z) before it    =  quantize_tokens(x, m, z)     on a CPU
    packed_int8_linear(q, s, z, ...)           =  packed_int8_linear(q + 128, s, z + 128, ...)  CPU

What follows a product is done in it by the rules of `int8_epilogues`.

Claim: close to the quantized reference: the int8 product is exact, the order of scaling isn't.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.claim import Claim, Close
from fxopt.kernels import native
from fxopt.kernels.int8_linear_fused import row_sums
from fxopt.passes.kernel_selection.int8_epilogues import (
    ActivationInside,
    CastInside,
    QuantizeInside,
    TokensInside,
)
from fxopt.passes.kernel_selection.select_sparse24 import SelectSparse24Linear
from fxopt.passes.mixed_precision.half_values import is_cast
from fxopt.passes.quantization.float8_linear import SelectFloat8Linear
from fxopt.passes.quantization.int4_linear import SelectGroupedInt4Linear, SelectInt4Linear
from fxopt.passes.quantization.quantize_linear import (
    in_groups,
    in_same_groups,
    refuse_groups,
    refuse_other_groups,
)
from fxopt.program import Mode, Program
from fxopt.recipe import Recipe
from fxopt.rewriting import (
    Edit,
    Match,
    Rule,
    RulePass,
    Stage,
    constant,
    has_dtype,
    has_rank,
    hole,
    op,
)
from fxopt.rewriting.pattern import Op, Predicate

aten, ops = torch.ops.aten, torch.ops.fxopt

_INT8 = has_dtype(torch.int8)
_WEIGHT = op(
    ops.dequantize.default,
    constant("weight", _INT8),
    constant("weight_scale", has_rank(2)),
    hole("weight_dtype"),
)
_BY_TOKEN = (ops.quantize_per_token.default, ops.quantize_per_token_affine.default)


class SelectInt8Linear(Rule):
    """linear(dq(q, s), dq(Wq, Ws), b) = int8_linear(q, s, Wq, Ws, b)"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        op(ops.dequantize.default, hole("q", _INT8), hole("scale"), hole("dtype")),
        _WEIGHT,
        hole("bias"),
    )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("q", "scale", "weight", "weight_scale", "bias", "dtype")
        return edit.call(ops.int8_linear.default, *(match[name] for name in names))


def _affine(scale: Predicate) -> Op:
    """linear(dq(q, s, z), dq(Wq, Ws), b) with a zero point and such a scale."""
    x = op(
        ops.dequantize.default,
        hole("q"),
        hole("scale", scale),
        hole("dtype"),
        hole("zero_point", lambda zero_point: zero_point is not None),
    )
    return op(aten.linear.default, x, _WEIGHT, hole("bias"))


class SelectAffineInt8Linear(Rule):
    """linear(dq(q, s, z), dq(Wq, Ws), b) = int8_linear(q, s, Wq, Ws, b, z, ΣWq), s by token"""

    exclusive = False
    pattern = _affine(lambda scale: not has_rank(0)(scale))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("q", "scale", "weight", "weight_scale", "bias", "dtype", "zero_point")
        sums = _row_sums(match["weight"], edit)
        return edit.call(ops.int8_linear.default, *(match[name] for name in names), sums)


class SelectPackedInt8Linear(Rule):
    """linear(dq(q, s, z), dq(Wq, Ws), b) = packed_int8_linear(q, s, z, Wq, Ws, b), s one number"""

    exclusive = False
    pattern = _affine(has_rank(0))

    def refuse(self, match: Match) -> str | None:
        if match["dtype"] not in (torch.float32, torch.bfloat16):
            return f"it computes in {match['dtype']}; the kernel gives float32 and bfloat16"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("q", "scale", "zero_point", "weight", "weight_scale", "bias")
        inputs = [match[name] for name in names]
        return edit.call(
            ops.packed_int8_linear.default, *inputs, "none", None, None, match["dtype"]
        )


class FuseInt8Linear(Rule):
    """int8_linear(q, s, W, t, b, z, ΣW) = int8_linear_fused(q, s, z, W, t, ΣW, b)

    On CUDA, and on a CPU that the kernels are compiled for, where they quantize the tokens as well.
    """

    pattern = op(ops.int8_linear.default, rest=True)

    def __init__(self, compiled: bool) -> None:
        self.dtypes: dict[str, tuple[torch.dtype, ...]] = {
            "cuda": (torch.float32, torch.float16, torch.bfloat16)
        }
        if compiled:
            self.dtypes["cpu"] = (torch.float32, torch.bfloat16)

    def match(self, node: fx.Node) -> Match | None:
        return super().match(node) if node.meta["val"].device.type in self.dtypes else None

    def refuse(self, match: Match) -> str | None:
        if match["dtype"] not in self.dtypes[match["q"].meta["val"].device.type]:
            return f"it computes in {match['dtype']}, which the fused kernel doesn't"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        tokens = self._tokens(match["q"], edit) or (match["q"], match["scale"], match["zero_point"])
        names = ("weight", "weight_scale", "weight_sums", "bias")
        weights = (match[name] for name in names)
        return edit.call(ops.int8_linear_fused.default, *tokens, *weights, match["dtype"], "none")

    def _tokens(self, q: fx.Node, edit: Edit) -> tuple[fx.Node | None, ...] | None:
        """Codes, scales and zero points out of one kernel, where `q` is quantized by token."""
        quantize = q.args[0] if q.target is operator.getitem else None
        if not isinstance(quantize, fx.Node) or quantize.target not in _BY_TOKEN:
            return None
        x: Any = quantize.args[0]
        value = x.meta["val"]
        if value.device.type != "cpu" or value.dtype not in self.dtypes["cpu"]:
            return None
        tokens = edit.once((self, quantize), lambda: _quantized_tokens(quantize, edit))
        return tokens if len(tokens) == 3 else (*tokens, None)


class UnsignedActivations(Rule):
    """packed_int8_linear(q, s, z, ...) = packed_int8_linear(q + 128, s, z + 128, ...) on a CPU"""

    pattern = op(ops.packed_int8_linear.default, hole("q", has_dtype(torch.int8)), rest=True)

    def match(self, node: fx.Node) -> Match | None:
        return super().match(node) if node.meta["val"].device.type == "cpu" else None

    def refuse(self, match: Match) -> str | None:
        if match["zero_point"].op != "get_attr":
            return "its zero point is no constant"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        q, zero = match["q"], match["zero_point"]
        shifted = edit.once((self, q), lambda: edit.call(ops.shift_to_unsigned.default, q))
        unsigned = {"q": shifted, "zero_point": _unsigned(zero, edit)}
        return edit.call_by_name(ops.packed_int8_linear.default, {**match.bound, **unsigned})


class UnsignedOutput(Rule):
    """packed_int8_linear(..., s, z) + 128 = packed_int8_linear(..., s, z + 128)"""

    pattern = op(ops.shift_to_unsigned.default, op(ops.packed_int8_linear.default, rest=True))

    def refuse(self, match: Match) -> str | None:
        zero = match["out_zero_point"]
        return None if zero.op == "get_attr" else "its zero point is no constant"

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        zero = _unsigned(match["out_zero_point"], edit)
        unsigned = {"out_zero_point": zero, "dtype": torch.uint8}
        return edit.call_by_name(ops.packed_int8_linear.default, {**match.bound, **unsigned})


class SelectInt8WeightOnlyLinear(Rule):
    """linear(x, dq(Wq, Ws), b) = int8_weight_only_linear(x, Wq, Ws, b)"""

    exclusive = False
    pattern = op(aten.linear.default, hole("x"), _WEIGHT, hole("bias"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("x", "weight", "weight_scale", "bias")
        return edit.call(ops.int8_weight_only_linear.default, *(match[name] for name in names))


class SelectGroupedInt8Linear(Rule):
    """linear(round_groups(x, g), view(dq(view(Wq), Ws)), b) = int8_grouped_linear(x, Wq, Ws, b)"""

    exclusive = False
    pattern = in_same_groups(constant("weight", _INT8))

    def refuse(self, match: Match) -> str | None:
        return _refuse_zero_points(match) or refuse_other_groups(
            match, *match["weight"].meta["val"].shape
        )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("x", "weight", "scale", "bias")
        return edit.call(ops.int8_grouped_linear.default, *(match[name] for name in names))


def _refuse_zero_points(match: Match) -> str | None:
    if match["zero_point"] is None:
        return None
    return "its weight has zero points, which the kernel of int8 groups doesn't take"


class SelectInt8GroupsWeightOnly(Rule):
    """linear(x, view(dq(view(Wq), Ws)), b) = int8_weight_only_linear(x, Wq, Ws, b)"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        hole("x"),
        in_groups(constant("weight", _INT8)),
        hole("bias"),
    )

    def refuse(self, match: Match) -> str | None:
        return _refuse_zero_points(match) or refuse_groups(
            match, *match["weight"].meta["val"].shape
        )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("x", "weight", "scale", "bias")
        return edit.call(ops.int8_weight_only_linear.default, *(match[name] for name in names))


@dataclass(frozen=True, repr=False)
class SelectKernels(RulePass):
    """Quantized regions become fused int8 operators. Claim: close to the quantized reference.

    `Lower` runs it by itself; give it on its own to serve a quantized model without a compiler.
    """

    name: ClassVar[str] = "select-kernels"
    stage: ClassVar[Stage] = Stage.KERNELS
    claim: Claim = Close()

    def needs(self, mode: Mode) -> tuple[str, ...]:
        """Nothing: it is what the other passes of its level need."""
        return ()

    def rules(self, program: Program) -> Sequence[Rule]:
        """Activations first: the weight-only rules would match the same linears."""
        # Before a weight is laid out for one library, and then once more for another.
        compiled = bool(native.load())
        return (
            SelectInt8Linear(),
            SelectAffineInt8Linear(),
            SelectPackedInt8Linear(),
            SelectInt8WeightOnlyLinear(),
            SelectGroupedInt8Linear(),
            SelectInt8GroupsWeightOnly(),
            SelectGroupedInt4Linear(),
            SelectInt4Linear(),
            SelectFloat8Linear(),
            SelectSparse24Linear(program),
            FuseInt8Linear(compiled),
            UnsignedActivations(),
            UnsignedOutput(),
            ActivationInside(),
            QuantizeInside(),
            CastInside(),
            TokensInside(),
        )


def _of_columns(target: Any, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What `target` makes `x` of with a float32 constant of the last axis, and that; else `x`."""
    if x.target is not target or x.kwargs or x.meta["val"].dtype != torch.float32:
        return x, None
    source, constant = x.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(constant, fx.Node):
        return x, None
    value, last = constant.meta["val"], x.meta["val"].shape[-1]
    fits = constant.op == "get_attr" and value.dtype == torch.float32 and value.shape == (last,)
    of_same_kind = source.meta["val"].dtype == torch.float32
    return (source, constant) if fits and of_same_kind else (x, None)


def _before_widening(x: fx.Node) -> fx.Node:
    """A bfloat16 value that `x` is in float32, where it is; the kernel reads either."""
    source: Any = x.args[0] if is_cast(x, torch.float32) else x
    return source if source.meta["val"].dtype == torch.bfloat16 else x


def _quantized_tokens(quantize: fx.Node, edit: Edit) -> tuple[fx.Node, ...]:
    """Codes, scales and (affine) zero points in place of the results of `quantize`."""
    affine = quantize.target is ops.quantize_per_token_affine.default
    source: Any = quantize.args[0]
    x, shift = _of_columns(aten.sub.Tensor, source)
    x, factor = _of_columns(aten.mul.Tensor, x)
    if shift is None and factor is None:
        x = _before_widening(x)
    made = edit.call(ops.quantize_tokens.default, x, factor, shift, affine)
    tokens = tuple(edit.item(made, index) for index in range(3 if affine else 2))
    for old in quantize.users:
        edit.stand_for(tokens[old.args[1]], old)  # type: ignore[index]
    return tokens


def _unsigned(zero_point: fx.Node, edit: Edit) -> fx.Node:
    def make() -> fx.Node:
        shifted = ops.shift_to_unsigned(edit.tensor(zero_point))
        return edit.constant(f"{zero_point.target}_unsigned", shifted)

    return edit.once(("unsigned", zero_point), make)


def _row_sums(weight: fx.Node, edit: Edit) -> fx.Node:
    source = edit.state(weight)
    shape = torch.Size((source.shape[0],))
    sums = Recipe(row_sums, (source,), shape, torch.int32, source.device)
    return edit.constant(f"{weight.target}_sums", sums)
