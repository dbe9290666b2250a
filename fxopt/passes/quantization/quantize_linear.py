"""The rule behind Int8Linear: one linear layer on int8 weights, and how its input is rounded.

weight_only   x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b
dynamic       x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b        a scale a token, at run time
static        x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b        one scale, from calibration
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxopt.kernels import saturates
from fxopt.operators import Linear, reads_as_linear, refuse_shared_weight
from fxopt.passes.linear_layers.linear_rule import ProductRule
from fxopt.passes.linear_layers.selection import Selection, refuse_by_path, refuse_weight
from fxopt.passes.quantization.split_outliers import is_outlying
from fxopt.recipe import materialize
from fxopt.rewriting import Edit, Match, constant, hole, op
from fxopt.rewriting.pattern import Op, Pattern
from fxopt.weights import quantize_rows

aten, ops = torch.ops.aten, torch.ops.fxopt

Int8Mode = Literal["dynamic", "static", "weight_only"]
Activations = Literal["symmetric", "affine"]
Range = Literal["auto", 7, 8]
Rounded = tuple[Tensor, Tensor]
"""int8 values [N, K] of a weight, and float32 scales [N, 1] or [N, K / group]."""

WeightKey = tuple[str, bool]
"""The name of a weight, and whether it is used transposed."""

Call = Callable[..., Any]
"""`call(operator, *arguments)`: runs it on tensors, or writes it into a graph (`Edit.call`)."""

_STEPS = 255
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def bits_of(given: Range, linears: Sequence[Linear]) -> int:
    """How many bits int8 weights have that are multiplied by rounded inputs: as given, or 7 where a
    device multiplies 8 bits exactly in float alone."""
    if given != "auto":
        return given
    return 7 if any(saturates(linear.weight.meta["val"].device) for linear in linears) else 8


@dataclass(frozen=True)
class StaticScale:
    """One scale and zero point for every value of an activation: `(q - zero_point) * scale`."""

    scale: float
    zero_point: int
    dtype: torch.dtype

    @staticmethod
    def of_range(low: float, high: float, activations: Activations) -> StaticScale:
        """uint8 for [low, high] (`affine`), or int8 for [-m, m], m the larger magnitude."""
        if activations == "symmetric":
            scale = max(max(-low, high) / 127, _SMALLEST_SCALE)
            return StaticScale(scale, 0, torch.int8)
        scale = max((high - low) / _STEPS, _SMALLEST_SCALE)
        return StaticScale(scale, min(max(round(-low / scale), 0), _STEPS), torch.uint8)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The scale, float32, and the zero point, both of rank 0."""
        return (
            torch.tensor(self.scale, dtype=torch.float32, device=device),
            torch.tensor(self.zero_point, dtype=self.dtype, device=device),
        )


@dataclass(frozen=True)
class Scheme:
    """How linears are rounded: the options, and what planning found out for them.

    Weights have `bits` bits: 8, or 7 within an int8, for products that would saturate.
    `scales` gives the static scale of a linear's input by the linear's node name, `weights` a
    weight rounded ahead by what `weight_key` gives, `kept` the reason for leaving a linear alone by
    its node's name.
    """

    mode: Int8Mode
    activations: Activations
    group: int | None
    include: tuple[Selection, ...]
    exclude: tuple[Selection, ...]
    tied: bool
    bits: int = 8
    scales: Mapping[str, StaticScale] = field(default_factory=dict)
    weights: Mapping[WeightKey, Rounded] = field(default_factory=dict, repr=False, compare=False)
    kept: Mapping[str, str] = field(default_factory=dict)

    def round_weight(self, weight: Tensor) -> Rounded:
        """A float weight [N, K] to the nearest int8 values."""
        return quantize_rows(weight.detach(), bits=self.bits, group=self.group)

    def dense_weight(self, linear: Linear, q: Any, scale: Any, call: Call) -> Any:
        """dq(q(W)) [N, K], of values and scales as `stored` gives them."""
        if self.group is None:
            return call(ops.dequantize.default, q, scale, linear.dtype)
        rows, inner = linear.out_features, linear.in_features
        q = call(aten.view.default, q, [rows, inner // self.group, self.group])
        weight = call(ops.dequantize.default, q, scale, linear.dtype)
        return call(aten.view.default, weight, [rows, inner])

    def stored(self, rounded: Rounded) -> Rounded:
        """Values [N, K] and scales as they broadcast: [N, K / group, 1] where there are groups."""
        values, scale = rounded
        return values, scale if self.group is None else scale.unsqueeze(-1)

    def static_scale(self, linear: Linear) -> tuple[Tensor, ...]:
        """The scale and the zero point of the linear's input where it has them ahead."""
        if self.mode != "static":
            return ()
        # By the linear's name: its input may be a linear that was rewritten, under another name.
        return self.scales[linear.node.name].tensors(linear.x.meta["val"].device)

    def rounded_input(self, x: Any, dtype: torch.dtype, static: Sequence[Any], call: Call) -> Any:
        """dq(q(x)) in `dtype`; `static` stands for what `static_scale` gives."""
        if self.mode == "weight_only":
            return x
        if self.mode == "static":
            scale, zero_point = static
            q = call(ops.quantize.default, x, scale, zero_point)
            return call(ops.dequantize.default, q, scale, dtype, zero_point)
        if self.group is not None:
            return call(ops.round_groups.default, x, self.group)
        affine = self.activations == "affine"
        quantize = ops.quantize_per_token_affine if affine else ops.quantize_per_token
        results = call(quantize.default, x)
        q, scale = (call(operator.getitem, results, index) for index in range(2))
        rest = (call(operator.getitem, results, 2),) if affine else ()
        return call(ops.dequantize.default, q, scale, dtype, *rest)


class QuantizeLinear(ProductRule):
    """x @ Wᵀ + b ~ dq(q(x)) @ dq(q(W))ᵀ + b"""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        scheme = self.scheme
        unfit = refuse_by_path(linear, scheme.include, scheme.exclude) or refuse_weight(linear)
        if unfit is not None:
            return unfit
        if is_outlying(linear):
            return "it multiplies the outliers that SplitOutliers keeps in float"
        if scheme.group is not None and linear.in_features % scheme.group:
            return f"its K = {linear.in_features} is no multiple of group={scheme.group}"
        shared = None if scheme.tied else refuse_shared_weight(linear, reads_as_linear)
        return shared or scheme.kept.get(linear.node.name)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        weight = self._weight(linear, edit)
        return edit.call(aten.linear.default, self._input(linear, edit), weight, linear.bias)

    def _input(self, linear: Linear, edit: Edit) -> fx.Node:
        """dq(q(x)), made once for linears that share x."""
        x: Any = linear.x
        if self.scheme.mode == "static" and self._is_masked_for_nothing(linear, edit):
            x = x.args[0]

        def make() -> fx.Node:
            named = zip(("scale", "zero_point"), self.scheme.static_scale(linear), strict=False)
            static = [edit.constant(f"{x.name}_{name}", number) for name, number in named]
            rounded: fx.Node = self.scheme.rounded_input(x, x.meta["val"].dtype, static, edit.call)
            return rounded

        return edit.once((self, x, linear.x), make)

    def _is_masked_for_nothing(self, linear: Linear, edit: Edit) -> bool:
        """Whether x is y times a mask, and W zero wherever the mask is.

        `SplitOutliers` masks what the scale is learnt from. Once that is known, y may saturate
        where the columns of W are zero, and the codes can come straight out of what made y.
        """
        x = linear.x
        mask = x.args[1] if x.target is aten.mul.Tensor else None
        if not isinstance(mask, fx.Node) or mask.op != "get_attr" or mask.meta["val"].ndim != 1:
            return False
        values = edit.tensor(mask)
        weight = materialize(linear.weight_nk(edit.state(linear.weight))).detach()
        binary = bool(((values == 0) | (values == 1)).all())
        return binary and not bool(weight[:, values == 0].any())

    def _weight(self, linear: Linear, edit: Edit) -> fx.Node:
        """dq(q(W)) [N, K]; the int8 weight is made once for linears that share it."""

        def make() -> fx.Node:
            values, scale = self.scheme.stored(self._rounded_weight(linear, edit))
            q = edit.constant(f"{linear.name}_int8", values)
            s = edit.constant(f"{linear.name}_scale", scale)
            dense: fx.Node = self.scheme.dense_weight(linear, q, s, edit.call)
            return dense

        return edit.once((self, weight_key(linear)), make)

    def _rounded_weight(self, linear: Linear, edit: Edit) -> Rounded:
        ahead = self.scheme.weights.get(weight_key(linear))
        if ahead is not None:
            return ahead
        rows = linear.weight_nk(edit.state(linear.weight))
        return self.scheme.round_weight(materialize(rows))


def weight_key(linear: Linear) -> WeightKey:
    """One tensor can serve as W here and as Wᵀ there; their rows are not the same."""
    return linear.name, linear.transposed


def in_groups(values: Pattern) -> Op:
    """view(dq(view(values), scale, dtype, zero_point)): a weight [N, K] with scales [N, K / g, 1].

    `zero_point` is None where it has none.
    """
    grouped = op(aten.view.default, values, hole("grouped"))
    rest = (constant("scale"), hole("weight_dtype"), hole("zero_point"))
    return op(aten.view.default, op(ops.dequantize.default, grouped, *rest), hole("shape"))


def in_same_groups(values: Pattern) -> Op:
    """linear(round_groups(x, group), W, bias), W as `in_groups` has it."""
    x = op(ops.round_groups.default, hole("x"), hole("group"))
    return op(aten.linear.default, x, in_groups(values), hole("bias"))


def refuse_other_groups(match: Match, rows: int, inner: int) -> str | None:
    """Why what `in_same_groups` matched has x in other groups than its weight [rows, inner]."""
    unfit = refuse_groups(match, rows, inner)
    if unfit is not None or match["group"] == inner // match["scale"].meta["val"].shape[1]:
        return unfit
    return "its input is rounded in other groups than its weight"


def refuse_groups(match: Match, rows: int, inner: int) -> str | None:
    """Why what `in_groups` matched is no weight [rows, inner] with a scale for each group."""
    scale = list(match["scale"].meta["val"].shape)
    shapes = list(match["shape"]), list(match["grouped"]), scale
    groups = scale[1] if len(scale) == 3 else 1
    wanted = [rows, inner], [rows, groups, inner // groups], [rows, groups, 1]
    return None if shapes == wanted else "its scales are not one for each group of columns"
