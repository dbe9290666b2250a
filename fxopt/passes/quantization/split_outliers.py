"""SplitOutliers: the few input channels with huge values leave a linear and are multiplied apart.

    x @ Wᵀ + b  =  (x · m) @ W₀ᵀ + b  +  x_o @ W_oᵀ          o: the outlier channels
    x_o         =  f(h @ U_oᵀ + c_o)       where x = f(h @ Uᵀ + c), else x[..., o]

m is 0 at o and 1 elsewhere, W₀ is W without (zeros in) the columns o, W_o those columns. In a
trained transformer a handful of channels carries values five or more times as large as all others;
one scale for all then wastes most of its steps on them. Without them int8 resolves the rest, and
what is multiplied apart, in float, is a hundredth of the product. Exact in real arithmetic.
Source: Dettmers et al., "LLM.int8()" (2022), whose outliers are found at run time; here they are
found by calibration, so that shapes stay static and nothing is gathered where x = f(h @ Uᵀ + c).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Close
from fxopt.nodes import origins
from fxopt.observation import ChannelMagnitude
from fxopt.operators import Linear, as_linear, refuse_shared_weight
from fxopt.passes.linear_layers.linear_rule import JudgedPlan, LinearRule, judged_plan
from fxopt.passes.linear_layers.selection import refuse_by_path
from fxopt.program import Origin, Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Pass, Stage, rewrite
from fxopt.rewriting.option_annotations import Globs
from fxopt.rewriting.option_types import Bounds

aten = torch.ops.aten

OUTLIERS, MAIN = Origin("split-outliers", "outliers"), Origin("split-outliers", "main")
"""Parts of split weights: float columns, and what int8 may round."""

_ELEMENTWISE: frozenset[Any] = frozenset(
    {aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default}
)


class SplitLinear(LinearRule):
    """x @ Wᵀ + b = (x · m) @ W₀ᵀ + b + x_o @ W_oᵀ"""

    def __init__(
        self,
        options: SplitOutliers,
        channels: Mapping[str, tuple[int, ...]],
        reasons: Mapping[str, str],
    ) -> None:
        self.options, self.channels, self.reasons = options, channels, reasons

    def match(self, node: fx.Node) -> Match | None:
        match = super().match(node)
        if match is None or is_split(match["linear"]):
            return None
        return match

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        unasked = refuse_by_path(linear, self.options.include, self.options.exclude)
        if unasked is not None:
            return unasked
        if not linear.dtype.is_floating_point or linear.x.meta["val"].dtype != linear.dtype:
            return f"it multiplies {linear.x.meta['val'].dtype} by {linear.dtype}"
        if linear.in_features <= self.options.channels:
            return f"it has {linear.in_features} input channels, no more than would be split off"
        shared = refuse_shared_weight(linear, lambda user: as_linear(user) is not None)
        return shared or self.reasons.get(linear.node.name)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        channels = torch.tensor(self.channels[linear.node.name])
        name, weight = str(linear.weight.target), linear.weight
        rows = linear.weight_nk(edit.state(weight))
        without = _recipe(_Without(channels), rows, rows.shape)
        main = edit.constant(f"{name}_main", without, origin=MAIN, of=weight)
        columns = _recipe(_Columns(channels), rows, (linear.out_features, len(channels)))
        own = edit.constant(f"{name}_outliers", columns, origin=OUTLIERS, of=weight)
        masked, apart = edit.once(
            (self, linear.x),
            lambda: (_masked(linear, channels, edit), _outlying(linear.x, channels, edit)),
        )
        product = edit.call(aten.linear.default, masked, main, linear.bias)
        return edit.call(aten.add.Tensor, product, edit.call(aten.linear.default, apart, own))


class SplitPlan(JudgedPlan):
    """A plan that has found the channels to split off."""


@dataclass(frozen=True, repr=False)
class SplitOutliers(Pass[SplitPlan]):
    """The `channels` largest input channels of a linear are multiplied apart, in float.

    Where, by `transform(calibration=)`, the largest input channel is at least `ratio` times as
    large as what remains without the `channels` largest. For `Int8Linear` after it, which leaves
    the outliers in float, and best with `mode="static"`. `include` and `exclude` are globs over
    module paths. Claim: close; exact in real arithmetic.

    Raises `PassError` for numbers that make no sense.
    """

    channels: Annotated[int, Bounds(least=1)] = 16
    ratio: Annotated[float, Bounds(above=1)] = 2.0
    include: Globs = ("*",)
    exclude: Globs = ()
    claim: Claim = Close()
    name: ClassVar[str] = "split-outliers"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def plan(self, program: Program) -> SplitPlan:
        """The linears whose inputs have outliers, with their channels."""
        make, rule = partial(SplitPlan, repr(self)), partial(SplitLinear, self)
        return judged_plan(program, make, rule, ChannelMagnitude, self._outliers)

    def apply(self, program: Program, plan: SplitPlan) -> Program:
        """Split the plan's linears."""
        rules = (SplitLinear(self, plan.found, plan.reasons),)
        return rewrite(program, rules, plan.excluded)

    def _outliers(self, seen: ChannelMagnitude) -> tuple[tuple[int, ...] | None, str]:
        """The largest channels and how much they exceed the rest, or why they don't by enough."""
        if seen.largest.numel() <= self.channels:
            return None, "its input was never seen"
        values, order = seen.largest.sort(descending=True, stable=True)
        first, rest = float(values[0]), float(values[self.channels])
        excess = first / rest if rest else math.inf
        if first == 0.0 or excess < self.ratio:
            text = f"its largest input channel is {excess:.1f} times the rest, below {self.ratio:g}"
            return None, text
        chosen = tuple(sorted(order[: self.channels].tolist()))
        return chosen, f"{len(chosen)} channels of up to {first:.3g} apart, {rest:.3g} remains"


def is_split(linear: Linear) -> bool:
    """Whether this linear is one of the two halves that `SplitOutliers` makes."""
    return is_outlying(linear) or MAIN in origins(linear.weight)


def is_outlying(linear: Linear) -> bool:
    """Whether this linear belongs to the outliers, which stay in float."""
    return OUTLIERS in origins(linear.weight)


def _masked(linear: Linear, channels: Tensor, edit: Edit) -> fx.Node:
    """x · m."""
    value = linear.x.meta["val"]
    mask = torch.ones(linear.in_features, dtype=value.dtype, device=value.device)
    mask[channels.to(value.device)] = 0.0
    constant = edit.constant(f"{linear.x.name}_mask", mask)
    return edit.call(aten.mul.Tensor, linear.x, constant)


def _outlying(x: fx.Node, channels: Tensor, edit: Edit) -> fx.Node:
    """x[..., o], from few rows of the linear before where there is one."""
    maker: Any = x.args[0] if x.target in _ELEMENTWISE else None
    linear = as_linear(maker) if isinstance(maker, fx.Node) else None
    if linear is None:
        index = edit.constant(f"{x.name}_channels", channels.to(x.meta["val"].device))
        return edit.call(aten.index_select.default, x, x.meta["val"].ndim - 1, index)
    rows = linear.weight_nk(edit.state(linear.weight))
    count = len(channels)
    few = _recipe(_Rows(channels), rows, (count, linear.in_features))
    weight = edit.constant(
        f"{linear.weight.target}_outliers", few, origin=OUTLIERS, of=linear.weight
    )
    bias = None
    if linear.bias is not None:
        recipe = _recipe(_Rows(channels), edit.state(linear.bias), (count,))
        bias = edit.constant(f"{linear.bias.target}_outliers", recipe)
    before = edit.call(aten.linear.default, linear.x, weight, bias)
    return edit.call(x.target, before, *x.args[1:], **x.kwargs)


@dataclass(frozen=True)
class _Columns:
    channels: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.index_select(1, self.channels.to(rows.device))


@dataclass(frozen=True)
class _Rows:
    channels: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.channels.to(rows.device))


@dataclass(frozen=True)
class _Without:
    channels: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.index_fill(1, self.channels.to(rows.device), 0.0)


def _recipe(make: Any, source: Tensor | Recipe, shape: Sequence[int]) -> Recipe:
    return Recipe(
        make, (source,), torch.Size(shape), source.dtype, source.device, source.requires_grad
    )
