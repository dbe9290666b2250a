"""The rule behind Int8Linear: one linear layer on int8 weights, and how its input is rounded.

weight_only   x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b
dynamic       x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b        a scale a token, at run time
static        x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b        one scale, from calibration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxopt.analyses import Linear, quantize_rows, reads_as_linear, refuse_shared_weight
from fxopt.passes.linear_rule import LinearRule
from fxopt.passes.selection import Selection, refuse_by_path, refuse_weight
from fxopt.passes.split_outliers import is_outlying
from fxopt.program import materialize
from fxopt.rewriting import Edit, Match

aten, ops = torch.ops.aten, torch.ops.fxopt

Int8Mode = Literal["dynamic", "static", "weight_only"]
Activations = Literal["symmetric", "affine"]
Rounded = tuple[Tensor, Tensor]
"""int8 values [N, K] of a weight, and float32 scales [N, 1] or [N, K / group]."""

WeightKey = tuple[str, bool]
"""The name of a weight, and whether it is used transposed."""

_STEPS = 255
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


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
    scales: Mapping[str, StaticScale] = field(default_factory=dict)
    weights: Mapping[WeightKey, Rounded] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    def round_weight(self, weight: Tensor) -> Rounded:
        """A float weight [N, K] to the nearest int8 values."""
        return quantize_rows(weight.detach(), group=self.group)

    def rounded_input(self, x: Tensor, name: str) -> Tensor:
        """dq(q(x)), where `name` is the node of the linear that reads `x`."""
        if self.mode == "weight_only":
            return x
        rounded: Tensor
        if self.mode == "static":
            scale, zero_point = self.scales[name].tensors(x.device)
            q = ops.quantize(x, scale, zero_point)
            rounded = ops.dequantize(q, scale, x.dtype, zero_point)
        elif self.activations == "affine":
            q, scale, zero_point = ops.quantize_per_token_affine(x)
            rounded = ops.dequantize(q, scale, x.dtype, zero_point)
        else:
            rounded = ops.dequantize(*ops.quantize_per_token(x), x.dtype)
        return rounded


class QuantizeLinear(LinearRule):
    """x @ Wᵀ + b ~ dq(q(x)) @ dq(q(W))ᵀ + b"""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.weights: dict[WeightKey, fx.Node] = {}
        self.rounded: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

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
        x = linear.x if self.scheme.mode == "weight_only" else self._input(linear, edit)
        return edit.call(aten.linear.default, x, weight, linear.bias)

    def _input(self, linear: Linear, edit: Edit) -> fx.Node:
        """dq(q(x)), made once for linears that share x: roots come in topological order."""
        x: Any = linear.x
        if self.scheme.mode == "static" and self._is_masked_for_nothing(linear, edit):
            x = x.args[0]
        key = (x, linear.x)
        if key not in self.rounded:
            self.rounded[key] = _INPUTS[self.scheme.mode](self.scheme, linear, x, edit)
        return self.rounded[key]

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
        weight = materialize(linear.rows_first(edit.state(linear.weight))).detach()
        binary = bool(((values == 0) | (values == 1)).all())
        return binary and not bool(weight[:, values == 0].any())

    def _weight(self, linear: Linear, edit: Edit) -> fx.Node:
        """dq(q(W)) [N, K]; the int8 weight is made once for linears that share it."""
        key = weight_key(linear)
        name = str(linear.weight.target)
        if key not in self.weights:
            values, scale = self._rounded_weight(linear, edit)
            if self.scheme.group is not None:
                values, scale = in_groups(values, scale)
            q = edit.constant(f"{name}_int8", values)
            s = edit.constant(f"{name}_scale", scale)
            weight = edit.call(ops.dequantize.default, q, s, linear.dtype)
            if self.scheme.group is not None:
                shape = [linear.out_features, linear.in_features]
                weight = edit.call(aten.reshape.default, weight, shape)
            self.weights[key] = weight
        return self.weights[key]

    def _rounded_weight(self, linear: Linear, edit: Edit) -> Rounded:
        ahead = self.scheme.weights.get(weight_key(linear))
        if ahead is not None:
            return ahead
        rows = linear.rows_first(edit.state(linear.weight))
        return self.scheme.round_weight(materialize(rows))


def weight_key(linear: Linear) -> WeightKey:
    """One tensor can serve as W here and as Wᵀ there; their rows are not the same."""
    return str(linear.weight.target), linear.transposed


def in_groups(values: Tensor, scale: Tensor) -> Rounded:
    """int8 [N, K / group, group] and scales [N, K / group, 1] that broadcast against them."""
    return values.reshape(*scale.shape, -1), scale.unsqueeze(-1)


def _static_input(scheme: Scheme, linear: Linear, x: fx.Node, edit: Edit) -> fx.Node:
    value = x.meta["val"]
    # By the linear's name: by now `x` may be a linear that was rewritten, under another name.
    numbers = scheme.scales[linear.node.name].tensors(value.device)
    named = zip(("scale", "zero_point"), numbers, strict=True)
    scale, zero_point = (edit.constant(f"{x.name}_{name}", number) for name, number in named)
    q = edit.call(ops.quantize.default, x, scale, zero_point)
    return edit.call(ops.dequantize.default, q, scale, value.dtype, zero_point)


def _dynamic_input(scheme: Scheme, linear: Linear, x: fx.Node, edit: Edit) -> fx.Node:
    dtype = x.meta["val"].dtype
    if scheme.activations == "affine":
        parts = edit.call(ops.quantize_per_token_affine.default, x)
        q, scale, zero_point = (edit.item(parts, index) for index in range(3))
        return edit.call(ops.dequantize.default, q, scale, dtype, zero_point)
    parts = edit.call(ops.quantize_per_token.default, x)
    q, scale = edit.item(parts, 0), edit.item(parts, 1)
    return edit.call(ops.dequantize.default, q, scale, dtype)


_INPUTS: Mapping[Int8Mode, Callable[[Scheme, Linear, fx.Node, Edit], fx.Node]] = {
    "static": _static_input,
    "dynamic": _dynamic_input,
}
