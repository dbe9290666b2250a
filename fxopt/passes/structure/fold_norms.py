"""FoldNorms: what a norm multiplies and adds per channel moves into the linears that read it.

    (n(x) * g + b) @ Wᵀ + c  =  n(x) @ (W * g)ᵀ + (c + W b)

n is a layer norm or an RMS norm without weights; an RMS norm may be written out, as transformers
does: g * (x * rsqrt(mean(x²) + eps)). Exact in real numbers; each product W * g is rounded once.
All readers must be linears: a residual that reads n(x) * g + b too needs g where it is, as in a
post-norm transformer. An RMS norm without weights commutes with rotations of the channels, and
weights that hold g say by themselves how much a channel counts.
Source: Ashkboos et al., "SliceGPT", ICLR 2024, and "QuaRot", NeurIPS 2024, which fold norms so
before they rotate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxopt.analyses.view_axes import Layout, is_view, through_view
from fxopt.claim import Claim, Close
from fxopt.constant_expressions import expression, is_computed_constant
from fxopt.nodes import arguments, label, same_sizes
from fxopt.operators import (
    PRODUCT_TARGETS,
    Linear,
    as_linear,
    refuse_shared_weight,
    why_no_linear,
)
from fxopt.operators.casts import CASTS, UNCHANGED
from fxopt.program import Mode, Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, either, find, hole, op
from fxopt.rewriting.pattern import Target

aten = torch.ops.aten

_SQUARE = either(
    op(aten.pow.Tensor_Scalar, hole("x"), hole("power", where=lambda power: power == 2)),
    op(aten.square.default, hole("x")),
    op(aten.mul.Tensor, hole("x"), hole("x")),
)
_MEAN = op(aten.mean.dim, _SQUARE, hole("axes"), True)
_INVERSE = op(aten.rsqrt.default, op(aten.add.Tensor, _MEAN, hole("eps")))
_RMS_NORM = op(aten.mul.Tensor, hole("x"), _INVERSE, commutes=True, name="normalised")
_WRITTEN_OUT = op(
    aten.mul.Tensor,
    hole("gain"),
    either(op(aten.to.dtype, _RMS_NORM, hole("dtype"), name="cast"), _RMS_NORM),
    commutes=True,
)


@dataclass(frozen=True)
class Norm:
    """y = n(x) * gain + shift, the value of `node`; `bare` is n(x) where the graph has it."""

    node: fx.Node
    gain: fx.Node | None
    shift: fx.Node | None
    bare: fx.Node | None = None

    @property
    def vectors(self) -> tuple[fx.Node, ...]:
        """What can be folded."""
        return tuple(one for one in (self.gain, self.shift) if one is not None)


@dataclass(frozen=True)
class Readers:
    """The linears that read a norm, and the views and casts between, upstream first."""

    linears: tuple[Linear, ...]
    path: tuple[fx.Node, ...]


class FoldNorm(Rule):
    """(n(x) * g + b) @ Wᵀ + c = n(x) @ (W * g)ᵀ + (c + W b)"""

    mode: Mode = "eval"
    moving: frozenset[str] = frozenset()

    def see(self, program: Program) -> None:
        """In train mode W * g would take other steps than W and g do."""
        self.mode = program.mode
        self.moving = program.learning | program.written

    def targets(self) -> tuple[Target, ...]:
        return (aten.layer_norm.default, aten.rms_norm.default, aten.mul.Tensor)

    def match(self, node: fx.Node) -> Match | None:
        """A norm with weights, and the linears behind it; or why it can't be folded."""
        norm = _as_norm(node)
        if norm is None or not norm.vectors or is_computed_constant(node):
            return None
        found = _readers(node, self.mode)
        if isinstance(found, str):
            return Match((node,), {"misfit": found})
        if not found.linears:
            return None
        # Where the new nodes stand, all that they read must have been computed.
        operands = dict.fromkeys(_operands(norm, found))
        bound = {f"operand {place}": node for place, node in enumerate(operands)}
        roots = tuple(linear.node for linear in found.linears)
        return Match(roots, {"norm": norm, "readers": found, **bound})

    def refuse(self, match: Match) -> str | None:
        if "misfit" in match.bound:
            return str(match["misfit"])
        norm, linears = match["norm"], match["readers"].linears
        for vector in norm.vectors:
            what = "its weight" if vector is norm.gain else "its bias"
            reason = self._refuse_constant(vector, what)
            if reason is not None:
                return reason
        value = norm.node.meta["val"]
        if not all(same_sizes(one.meta["val"].shape, value.shape[-1:]) for one in norm.vectors):
            return "its weight isn't one number for each channel of the last axis"
        x = norm.node.all_input_nodes[0].meta["val"]
        mixed = {one.meta["val"].dtype for one in norm.vectors} - {x.dtype}
        if norm.bare is None and mixed:
            return f"its weight is {mixed.pop()} and its input {x.dtype}, to which it would round"
        reasons = (self._refuse_linear(norm, linear, match.roots) for linear in linears)
        return next((reason for reason in reasons if reason is not None), None)

    def _refuse_linear(self, norm: Norm, linear: Linear, roots: Sequence[fx.Node]) -> str | None:
        where = label(linear.node)
        if not linear.dtype.is_floating_point:
            return f"{where} has a weight of {linear.dtype}"
        reason = self._refuse_constant(linear.weight, f"the weight of {where}")
        if reason is None and linear.bias is not None:
            reason = self._refuse_constant(linear.bias, f"the bias of {where}")
        if reason is not None:
            return reason
        shared = refuse_shared_weight(linear, lambda user: user in roots or _leads_to(user, roots))
        return None if shared is None else f"{where} can't take its weight: {shared}"

    def _refuse_constant(self, node: fx.Node, what: str) -> str | None:
        found = expression(node)
        if found is None:
            return f"{what} is computed, not constant"
        if any(str(leaf.target) in self.moving for leaf in found.leaves):
            return f"{what} is trained, and would take other steps folded"
        return None

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        norm, readers = match["norm"], match["readers"]
        moved = {norm.node: _without_weights(norm, edit)}
        for step in readers.path:
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda one: moved.get(one, one))
            moved[step] = edit.call(step.target, *args, **kwargs)
        made: dict[tuple[fx.Node, bool, fx.Node | None], tuple[fx.Node, fx.Node | None]] = {}
        results = []
        for linear in readers.linears:
            key = (linear.weight, linear.transposed, linear.bias)
            if key not in made:
                made[key] = _folded_weight(norm, linear, edit), _folded_bias(norm, linear, edit)
            results.append(edit.call(aten.linear.default, moved[linear.x], *made[key]))
        return results


@dataclass(frozen=True, repr=False)
class FoldNorms(RulePass):
    """The weight and bias of a norm fold into the linears that read it. Claim: close.

    Takes layer norms and RMS norms; the norm stays, without weights. Folded weights are new
    tensors, named after the linear's own with `_folded` behind. A norm with another reader (a
    residual, an output), or one whose linears share a weight with something else (a tied head), is
    left alone.
    """

    name: ClassVar[str] = "fold-norms"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    claim: Claim = Close()

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for all spellings."""
        return (FoldNorm(),)


def _as_norm(node: fx.Node) -> Norm | None:
    """The norm over the last axis that `node` computes, or None."""
    if node.target is aten.mul.Tensor:
        return _as_written_out(node)
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return None
    return Norm(node, given["weight"], given.get("bias"))


def _as_written_out(node: fx.Node) -> Norm | None:
    found = find((_WRITTEN_OUT,), node)
    if found is None or not isinstance(found["gain"], fx.Node):
        return None
    bare: fx.Node = found.bound.get("cast", found["normalised"])
    value, gain = bare.meta["val"], found["gain"].meta["val"]
    if [axis % value.ndim for axis in found["axes"]] != [value.ndim - 1]:
        return None
    if not isinstance(gain, Tensor) or expression(found["gain"]) is None:
        return None
    if not same_sizes(value.shape, node.meta["val"].shape):
        return None
    return Norm(node, found["gain"], None, bare)


def _readers(value: fx.Node, mode: Mode) -> Readers | str:
    """The linears that read `value`, all of them through what keeps its last axis; or what else
    reads it."""
    linears: list[Linear] = []
    path: list[fx.Node] = []
    waiting = [value]
    while waiting:
        source = waiting.pop(0)
        for user in source.users:
            if _keeps_last_axis(user, source):
                path.append(user)
                waiting.append(user)
                continue
            linear = as_linear(user, computed=mode == "eval")
            if linear is None or linear.x is not source or source in (linear.weight, linear.bias):
                return _misfit(user, mode)
            linears.append(linear)
    linears.sort(key=lambda linear: linear.node)
    return Readers(tuple(linears), tuple(path))


def _misfit(user: fx.Node, mode: Mode) -> str:
    if user.op == "output":
        return "it is an output of the model, which has its weight in it"
    kind = str(user.target).removeprefix("aten.").partition(".")[0]
    why: str | None = "only linears can take its weight"
    if user.target in PRODUCT_TARGETS:
        why = why_no_linear(user, mode) or why
    elif user.target in CASTS:
        why = f"{user.meta['val'].dtype} shows how its value was rounded"
    return f"{kind} reads it too, at {label(user)}: {why}"


def _keeps_last_axis(user: fx.Node, source: fx.Node) -> bool:
    """Whether `user` shows, copies or casts `source` with the channels where they were."""
    if user.op != "call_function" or not user.args or user.args[0] is not source:
        return False
    if user.target in (*CASTS, *UNCHANGED):
        return _is_no_wider(user.meta["val"].dtype, source.meta["val"].dtype)
    if not is_view(user):
        return False
    have, want = source.meta["val"].shape, user.meta["val"].shape
    if not want or not isinstance(want[-1], int) or not same_sizes(have[-1:], want[-1:]):
        return False
    layout = Layout.of_last_axis(user)
    up = through_view(user, layout)
    return isinstance(up, Layout) and up.is_last_axis_of(source, layout.index)


def _is_no_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether `dtype` has no more digits: more of them show how a product with g was rounded."""
    if not dtype.is_floating_point:
        return False
    return torch.finfo(dtype).eps >= torch.finfo(than).eps


def _operands(norm: Norm, readers: Readers) -> Iterator[fx.Node]:
    """What the folded linears will read that isn't made with them."""
    own = {norm.node, *readers.path}
    yield from norm.vectors
    yield from (norm.node.all_input_nodes if norm.bare is None else (norm.bare,))
    for step in readers.path:
        yield from (one for one in step.all_input_nodes if one not in own)
    for linear in readers.linears:
        yield linear.weight
        if linear.bias is not None:
            yield linear.bias


def _leads_to(user: fx.Node, roots: Sequence[fx.Node]) -> bool:
    """Whether a reader of a weight turns it for the linears in question alone."""
    return is_computed_constant(user) and all(
        one in roots or _leads_to(one, roots) for one in user.users
    )


def _without_weights(norm: Norm, edit: Edit) -> fx.Node:
    """n(x) in the dtype of the norm's value."""
    node, target = norm.node, norm.node.target
    assert isinstance(target, torch._ops.OpOverload)
    if norm.bare is None:
        return edit.call_by_name(target, {**arguments(node), "weight": None, "bias": None})
    dtype = node.meta["val"].dtype
    if norm.bare.meta["val"].dtype == dtype:
        return norm.bare
    return edit.call(aten.to.dtype, norm.bare, dtype)


def _folded_weight(norm: Norm, linear: Linear, edit: Edit) -> fx.Node:
    """W * g, [N, K]; W where there is no g."""
    rows = linear.weight_nk(edit.state(linear.weight))
    if norm.gain is not None:
        rows = _recipe(scaled_columns, (rows, edit.state(norm.gain)), rows.shape, rows.dtype)
    return edit.constant(f"{linear.name}_folded", rows)


def _folded_bias(norm: Norm, linear: Linear, edit: Edit) -> fx.Node | None:
    """c + W b, [N]; c itself where there is no b."""
    if norm.shift is None:
        return linear.bias
    rows = linear.weight_nk(edit.state(linear.weight))
    sources: tuple[Tensor | Recipe, ...] = (rows, edit.state(norm.shift))
    if linear.bias is not None:
        sources = (*sources, edit.state(linear.bias))
    dtype = linear.dtype if linear.bias is None else linear.bias.meta["val"].dtype
    name = linear.name.rpartition(".")[0]
    bias = _recipe(shifted_bias, sources, rows.shape[:1], dtype)
    return edit.constant(f"{name}.bias_folded" if name else "bias_folded", bias)


def _recipe(
    make: Callable[..., Tensor],
    sources: tuple[Tensor | Recipe, ...],
    shape: torch.Size,
    dtype: torch.dtype,
) -> Recipe:
    grad = any(source.requires_grad for source in sources)
    return Recipe(make, sources, shape, dtype, sources[0].device, grad)


def scaled_columns(rows: Tensor, gain: Tensor) -> Tensor:
    """W * g, [N, K], rounded once to the dtype of W."""
    return (rows * gain).to(rows.dtype)


def shifted_bias(rows: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    """c + W b, [N], summed in float32 at least, in the dtype of c, or of W where there is no c."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    moved = rows.to(wide) @ shift.to(wide)
    return moved.to(rows.dtype) if bias is None else (bias.to(wide) + moved).to(bias.dtype)
