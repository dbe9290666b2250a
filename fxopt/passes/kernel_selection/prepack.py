"""Prepack: linears and attention on this CPU's fastest kernels, weights laid out once.

    linear(x, W, b)                 =  packed_linear(x, W, b, "none")
    f(linear(x, W, b))              =  packed_linear(x, W, b, f)          f: relu, gelu, silu
    linear(x, W, b) + r             =  packed_linear(x, W, b, "add", r)
    scaled_dot_product_attention(q, k, v, mask)  =  attention(q, k, v, mask)
    scaled_dot_product_attention(q, k, v, mask)  =  written_attention(q, k, v, mask)
    quantize(attention(q, k, v, mask), s, z)     =  quantized_attention(q, k, v, mask, s, z)
    layer_norm(x, [K], w, b, eps)   =  the same in two passes, for the compiler

Attention in bfloat16 is one kernel where those of `fxopt.kernels.native` run, and else is written
out for the compiler. Claim: close; the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.claim import Claim, Close
from fxopt.kernels.attention import LANES
from fxopt.kernels.native import load as load_native
from fxopt.nodes import same_sizes, size_at_capture
from fxopt.operators import Linear
from fxopt.passes.kernel_selection.activations import ACTIVATIONS, activation_name
from fxopt.passes.linear_layers.linear_rule import ProductRule
from fxopt.passes.mixed_precision.half_values import is_cast
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Plan, Rule, RulePass, Stage, find, hole, op
from fxopt.rewriting.pattern import Target

aten, ops = torch.ops.aten, torch.ops.fxopt

_MOVES = (aten.transpose.int, aten.reshape.default, aten.view.default)
# Scores a head up to which they are worth writing to memory: 32 MiB in bfloat16 for 16 heads.
_MOST_WRITTEN_SCORES = 1 << 20

_PACKED = op(
    ops.packed_linear.default,
    hole("x"),
    hole("weight"),
    hole("bias"),
    "none",
    None,
    name="packed",
)


class PackLinear(ProductRule):
    """linear(x, W, b) = packed_linear(x, W, b, "none")"""

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        weight = linear.weight.meta["val"]
        if weight.device.type != "cpu":
            return f"its weight is on {weight.device}; packed layouts are for CPUs"
        if linear.dtype not in (torch.float32, torch.bfloat16):
            return f"its weight is {linear.dtype}; oneDNN packs float32 and bfloat16"
        if not linear.in_features or not linear.out_features:
            return "its weight is empty"
        if linear.x.meta["val"].dtype != linear.dtype:
            return "its input has another dtype than its weight"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        return edit.call(
            ops.packed_linear.default,
            linear.x,
            self._weight(linear, edit),
            linear.bias,
            "none",
            None,
        )

    def _weight(self, linear: Linear, edit: Edit) -> fx.Node:
        if not linear.transposed and linear.weight.op == "get_attr":
            return linear.weight

        def make() -> fx.Node:
            return edit.constant(f"{linear.name}_rows", linear.weight_nk(edit.state(linear.weight)))

        return edit.once((self, linear.weight), make)


class PackActivation(Rule):
    """f(packed_linear(x, W, b, "none")) = packed_linear(x, W, b, f)"""

    pattern = op(tuple(ACTIVATIONS), _PACKED, rest=True)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        inputs = (match[name] for name in ("x", "weight", "bias"))
        return edit.call(ops.packed_linear.default, *inputs, activation_name(match.root), None)


class RationalGelu(Rule):
    """gelu(x) = x/2 (1 + p(x)/q(x)), where no product takes it in"""

    pattern = op(aten.gelu.default, hole("x", lambda x: find((_PACKED,), x) is None))

    def refuse(self, match: Match) -> str | None:
        x = match["x"].meta["val"]
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"it is in {x.dtype} on {x.device}; the rational form is float32 for CPUs"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(ops.gelu.default, match["x"])


class PackResidual(Rule):
    """packed_linear(x, W, b, "none") + r = packed_linear(x, W, b, "add", r)"""

    pattern = op(
        aten.add.Tensor,
        _PACKED,
        hole("other", lambda other: isinstance(other, fx.Node)),
        commutes=True,
    )

    def refuse(self, match: Match) -> str | None:
        other, packed = match["other"].meta["val"], match["packed"].meta["val"]
        if other.dtype != packed.dtype or not same_sizes(other.shape, packed.shape):
            return "the addend has another shape or dtype"
        if not match["other"] < match["packed"]:
            return "the addend is computed after the product"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        inputs = (match[name] for name in ("x", "weight", "bias"))
        return edit.call(ops.packed_linear.default, *inputs, "add", match["other"])


class _Attention(Rule):
    """scaled_dot_product_attention as one of ours."""

    pattern = op(aten.scaled_dot_product_attention.default, rest=True)

    def refuse(self, match: Match) -> str | None:
        q, k, v = (match[name].meta["val"] for name in ("query", "key", "value"))
        if q.device.type != "cpu":
            return f"its inputs are on {q.device}; our kernels are for CPUs"
        if match["dropout_p"]:
            return "it drops out attention weights"
        if not q.ndim == k.ndim == v.ndim == 4:
            return "its inputs are not of rank 4"
        if not all(same_sizes(q.shape[:1], other.shape[:1]) for other in (k, v)):
            return "its queries have another batch than its keys"
        if match["attn_mask"] is not None and match["is_causal"]:
            return "it is causal and has a mask too"
        return None

    def scale(self, match: Match) -> Any:
        """What the scores are multiplied by."""
        given = match["scale"]
        return match["query"].meta["val"].shape[3] ** -0.5 if given is None else given


class PackAttention(_Attention):
    """scaled_dot_product_attention(q, k, v, mask, c, s) = attention(q, k, v, mask, c, s)"""

    def __init__(self, native: bool) -> None:
        self.native = native

    def refuse(self, match: Match) -> str | None:
        q, k, v = (match[name].meta["val"] for name in ("query", "key", "value"))
        reason = super().refuse(match)
        if reason is not None:
            return reason
        if q.dtype not in self._dtypes():
            return f"its inputs are {q.dtype}; aten's attention is as fast there"
        if not isinstance(q.shape[3], int) or not isinstance(v.shape[3], int):
            return "the size of its heads is not fixed"
        if self.native:
            odd = q.dtype == torch.bfloat16 and q.shape[3] % 2
            return (
                f"its heads are of size {q.shape[3]}; bfloat16 is multiplied in pairs"
                if odd
                else None
            )
        if not all(same_sizes(q.shape[1:2], other.shape[1:2]) for other in (k, v)):
            return "its queries have other heads than its keys (grouped or broadcast)"
        if not _fills_lanes(q.shape[3]) or not _fills_lanes(v.shape[3]):
            return f"its heads are of size {q.shape[3]}; oneDNN needs a multiple of {LANES}"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        mask = _before_expanding(match["attn_mask"])
        if mask is not None and mask.meta["val"].dtype not in (torch.bool, torch.float32):
            mask = _bias_of(mask, edit)
        inputs = (match[name] for name in ("query", "key", "value"))
        scale = self.scale(match)
        return edit.call(ops.attention.default, *inputs, mask, match["is_causal"], scale)

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16) if self.native else (torch.float32,)


class QuantizeAttention(Rule):
    """quantize(rows(attention(...)), s, z) = rows(quantized_attention(..., s, z))"""

    def targets(self) -> tuple[Target, ...]:
        return (ops.quantize.default,)

    def match(self, node: fx.Node) -> Match | None:
        _, scale, zero_point = node.args
        if scale.meta["val"].ndim or zero_point.meta["val"].ndim:  # type: ignore[union-attr]
            return None
        attention, moves = _before_moving(node.args[0])
        if attention is None or attention.target is not ops.attention.default:
            return None
        return Match((node,), {"attention": attention, "moves": moves}, (*moves, attention))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        _, scale, zero_point = match.root.args
        inputs = match["attention"].args
        result = edit.call(ops.quantized_attention.default, *inputs, scale, zero_point)
        for move in reversed(match["moves"]):
            if move.target in _MOVES:
                result = edit.call(move.target, result, *move.args[1:])
        return result


class WriteOutAttention(_Attention):
    """scaled_dot_product_attention(q, k, v, mask, c, s) = written_attention(q, k, v, mask, c, s)"""

    def match(self, node: fx.Node) -> Match | None:
        q = node.meta["val"]
        wanted = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        return super().match(node) if wanted else None

    def refuse(self, match: Match) -> str | None:
        q, k = (match[name].meta["val"] for name in ("query", "key"))
        if size_at_capture(q.shape[2]) * size_at_capture(k.shape[2]) > _MOST_WRITTEN_SCORES:
            return "it is too long to write its scores to memory"
        return super().refuse(match)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        mask = _before_expanding(match["attn_mask"])
        bias = None if mask is None else _bias_of(mask, edit)
        inputs = (match[name] for name in ("query", "key", "value"))
        scale = self.scale(match)
        return edit.call(ops.written_attention.default, *inputs, bias, match["is_causal"], scale)


class TwoPassNorm(Rule):
    """layer_norm(x, [K], w, b, eps) = c / sqrt(mean(c²) + eps) · w + b, c = x - mean(x)"""

    pattern = op(aten.layer_norm.default, rest=True)

    def refuse(self, match: Match) -> str | None:
        tensors = [match[name] for name in ("input", "weight", "bias") if match[name] is not None]
        x = match["input"].meta["val"]
        if x.device.type != "cpu" or {t.meta["val"].dtype for t in tensors} != {torch.float32}:
            return f"it is in {x.dtype} on {x.device}; two passes are for float32 on CPUs"
        if len(match["normalized_shape"]) != 1:
            return "it normalises several axes at once"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        inputs = (match[name] for name in ("input", "weight", "bias", "eps"))
        return edit.call(ops.layer_norm.default, *inputs)


@dataclass(frozen=True, repr=False)
class Prepack(RulePass):
    """Linears on packed weights, activations and residual adds inside; attention in one kernel.

    The kernels are those of `fxopt.kernels.native` on a CPU with AVX-512, compiled at first use;
    elsewhere oneDNN's, and bfloat16 attention written out for the compiler.

    The weight stays an ordinary tensor of the state; its packed copy, as large again, lives with
    the kernel. For CPUs, float32 and bfloat16. Claim: close.
    """

    name: ClassVar[str] = "prepack"
    stage: ClassVar[Stage] = Stage.KERNELS
    claim: Claim = Close()

    def plan(self, program: Program) -> Plan:
        """What the rules find, and whose kernels will run it."""
        plan = super().plan(program)
        return replace(plan, details=(load_native().reason,)) if _on_cpu(program) else plan

    def rules(self, program: Program) -> Sequence[Rule]:
        """The product first, then what can run in its epilogue."""
        native = _on_cpu(program) and bool(load_native())
        attention: tuple[Rule, ...] = (WriteOutAttention(), PackAttention(native))
        if native:
            # Elsewhere the compiler fuses the rounding with what comes before the next product.
            attention = (PackAttention(native), QuantizeAttention())
        return (
            PackLinear(),
            PackActivation(),
            RationalGelu(),
            PackResidual(),
            *attention,
            TwoPassNorm(),
        )


def _on_cpu(program: Program) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return all(v.device.type == "cpu" for v in values if isinstance(v, torch.Tensor))


def _before_expanding(mask: fx.Node | None) -> fx.Node | None:
    """A mask as it was before it got the sizes of the scores, to which it is expanded anyway."""
    while mask is not None and mask.target is aten.expand.default:
        source = mask.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].ndim != mask.meta["val"].ndim:
            break
        mask = source
    return mask


def _bias_of(mask: fx.Node, edit: Edit) -> fx.Node:
    """What is added to the scores, float32, made once for all layers of one mask."""
    return edit.once(("bias", mask), lambda: edit.call(ops.attention_bias.default, mask))


def _before_moving(node: Any) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """What `node` holds before its elements were moved or cast to float32, and those steps, the
    last one first."""
    moves: list[fx.Node] = []
    while isinstance(node, fx.Node) and (node.target in _MOVES or is_cast(node, torch.float32)):
        moves.append(node)
        node = node.args[0]
    return (node if isinstance(node, fx.Node) else None), tuple(moves)


def _fills_lanes(size: Any) -> bool:
    return isinstance(size, int) and size > 0 and size % LANES == 0
