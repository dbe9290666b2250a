"""Int4Linear: linear layers on int4 weights, at the numerics level: where values are rounded.

    x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b        q: one scale per output channel and group of inputs

symmetric   q(v) = clamp(round(v / s), -7, 7), dq(q) = q * s, s = max|v| / 7 over the group
affine      q(v) = clamp(round(v / s + z), -8, 7), dq(q) = (q - z) * s, s and z fitted to the group

The graph holds plain unpack / dequantize / linear; `SelectInt4Linear` turns each region into one
product:

    linear(x, view(dq(view(unpack_int4(P)), s, z)), b)  =  int4_weight_only_linear(x, P, s, b, z)

With `activations="int8"` the input is rounded too, in the groups of the weight, and the product is
`int4_grouped_linear`.

A weight takes 4 bits and a float32 scale per group, 4.25 bits at 128; or two float16 numbers, 5
bits at 32. It saves memory, and time where few rows meet it, as in the decoding of a language
model.
Source: groups: Shen et al., "Q-BERT", AAAI 2020; how they are fitted: `fxopt.weights.affine`,
`fxopt.weights.gptq` and `fxopt.weights.activation_scales`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import fx

from fxopt.claim import Claim, Sqnr
from fxopt.errors import PassError
from fxopt.nodes import label
from fxopt.operators import Linear
from fxopt.passes.linear_layers.linear_rule import chosen_linears
from fxopt.passes.linear_layers.selection import Selections
from fxopt.passes.quantization.int4_rounding import (
    Int4Scheme,
    Int4Weights,
    Packed,
    Rounding,
    choose_scales,
    round_by_inputs,
    scaled,
)
from fxopt.passes.quantization.quantize_linear import (
    QuantizeLinear,
    Scheme,
    WeightKey,
    in_groups,
    in_same_groups,
    refuse_groups,
    refuse_other_groups,
    weight_key,
)
from fxopt.passes.quantization.smoothing_rule import Smoothing
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.rewriting import (
    Edit,
    Match,
    Pass,
    Plan,
    Rule,
    Stage,
    constant,
    hole,
    op,
    plan_rules,
    rewrite,
)
from fxopt.rewriting.option_annotations import Give
from fxopt.rewriting.option_types import Bounds
from fxopt.rewriting.options import Conflict, follows

aten, ops = torch.ops.aten, torch.ops.fxopt

Int4Activations = Literal["float", "int8"]

_GROUPS: Mapping[Int4Scheme, tuple[int, ...]] = {
    "symmetric": (128, 64, 32),
    "affine": (32, 64, 128),
}
_FLOOR: Mapping[Int4Scheme, Claim] = {"symmetric": Sqnr(5.0), "affine": Sqnr(7.0)}
"""Decibels end to end: of the table of architectures, with random weights, 5.9 and 7.9 dB are kept.
"""
_AFFINE_ALONE = ("hqq", "weighted")


class QuantizeInt4Linear(QuantizeLinear):
    """x @ Wᵀ + b ~ x @ dq(q(W))ᵀ + b"""

    def __init__(
        self, options: Int4Linear, ahead: Mapping[WeightKey, Packed] | None = None
    ) -> None:
        super().__init__(options.selection)
        self.options = options
        self.ahead = ahead or {}

    def refuse(self, match: Match) -> str | None:
        reason = super().refuse(match)
        inner = match["linear"].in_features
        if reason is not None or self.options.group_of(inner) is not None:
            return reason
        wanted = " or ".join(map(str, sorted(self.options.groups)))
        return f"its K = {inner} is no multiple of {wanted}"

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        made = edit.once((self, weight_key(linear)), lambda: self._constants(linear, edit))
        packed, scale, *zero_point = made
        rows, groups, _ = scale.meta["val"].shape
        q = edit.call(ops.unpack_int4.default, packed)
        q = edit.call(aten.view.default, q, [rows, groups, linear.in_features // groups])
        dense = edit.call(ops.dequantize.default, q, scale, linear.dtype, *zero_point)
        dense = edit.call(aten.view.default, dense, [rows, linear.in_features])
        x = self._rounded(linear, linear.in_features // groups, edit)
        return edit.call(aten.linear.default, x, dense, linear.bias)

    def _rounded(self, linear: Linear, group: int, edit: Edit) -> fx.Node:
        """The input, rounded once for the linears that share it and a group."""
        if self.options.activations == "float":
            return linear.x
        rounded = partial(edit.call, ops.round_groups.default, linear.x, group)
        return edit.once((self, linear.x, group), rounded)

    def _constants(self, linear: Linear, edit: Edit) -> tuple[fx.Node, ...]:
        """The packed weight, its scales and, if affine, its zero points."""
        values = self.ahead.get(weight_key(linear))
        if values is None:
            if self.options.rounding.needs_inputs:
                raise PassError(
                    f"{label(linear.node)} isn't among the weights that {self.options!r} planned: "
                    "apply the plan to the program that it was made for"
                )
            rows = materialize(linear.weight_nk(edit.state(linear.weight)))
            group = self.options.group_of(linear.in_features)
            assert group is not None
            values = self.options.rounding.round(linear, rows, group, None)
        roles = ("int4", "scale", "zero_point")
        named = zip(roles, values, strict=False)
        return tuple(edit.constant(f"{linear.name}_{role}", value) for role, value in named)


class SelectGroupedInt4Linear(Rule):
    """linear(round_groups(x, g), W, b) = int4_grouped_linear(x, P, s, b, z)

    for W = view(dq(view(unpack(P)), s, z)) in the same groups.
    """

    exclusive = False
    pattern = in_same_groups(op(ops.unpack_int4.default, constant("packed")))

    def refuse(self, match: Match) -> str | None:
        rows, half = match["packed"].meta["val"].shape
        return refuse_other_groups(match, rows, 2 * half)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(ops.int4_grouped_linear.default, *_operands(match))


def _operands(match: Match) -> list[Any]:
    """x, the packed weight, its scales, the bias and, where there are any, zero points."""
    zero = () if match["zero_point"] is None else (match["zero_point"],)
    return [*(match[name] for name in ("x", "packed", "scale", "bias")), *zero]


class SelectInt4Linear(Rule):
    """linear(x, view(dq(view(unpack(P)), s, z)), b) = int4_weight_only_linear(x, P, s, b, z)"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        hole("x"),
        in_groups(op(ops.unpack_int4.default, constant("packed"))),
        hole("bias"),
    )

    def refuse(self, match: Match) -> str | None:
        rows, half = match["packed"].meta["val"].shape
        return refuse_groups(match, rows, 2 * half)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(ops.int4_weight_only_linear.default, *_operands(match))


@dataclass(frozen=True)
class Int4Plan(Plan):
    """A plan with what calibration told: how inputs are scaled, and weights by the names that they
    have then."""

    scales: tuple[Smoothing, ...] = field(default=(), repr=False, compare=False)
    weights: Mapping[WeightKey, Packed] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class Int4Linear(Pass[Int4Plan]):
    """Linear layers on int4 weights, two a byte; activations stay as they are, or become int8.

    Each `group` input channels of an output channel have a scale; left out, it is the largest of
    128, 64 and 32 that divides their number, and a layer that none divides is refused.
    `scheme="affine"` gives a group a zero point as well, fits both to it by least squares, its ends
    clipped where that pays, and stores them in float16; `group` left out is 32 where that divides.

    `weights` says what the integers and their scales are fitted to. Without data: `"nearest"`, the
    weight; `"hqq"` (affine), the weight but for its outliers. From `transform(calibration=)`, all
    layers on the inputs that the unrounded model gives them, and no row worse than the nearest on
    these: `"weighted"` (affine), the weight, a column counting as the squares of its inputs;
    `"gptq"`, the outputs, by error feedback, columns of large inputs first; `"awq"`, which scales
    the channels of each input before, folded into what computes it or as a multiply, and `"awq-
    gptq"` both. All programs of a model that generates round a weight alike.

    `activations="int8"` rounds each token of the input as well, with a scale for each group, taken
    at run time: few rows are then multiplied as integers, about twice as fast where a CPU has the
    instructions; `"float"` leaves the input as it is.

    `include` and `exclude` are globs over module paths (`"encoder.layer.*.output.dense"`) or
    functions of the path. A weight that an embedding reads too is left alone unless `tied=True`.
    Claim: a signal-to-noise ratio of the model's outputs, 5 dB symmetric and 7 dB affine, unless
    `claim` gives another.

    Raises `PassError` for options that don't exist or don't go together, and for a weight that
    holds NaN or infinity.
    """

    group: Annotated[
        Annotated[int, Bounds(least=2, multiple_of=2)] | None,
        Give(
            "an even number of input channels, such as 128, 64 or 32, or None for the largest of "
            "these that fits"
        ),
    ] = None
    weights: Int4Weights = "nearest"
    include: Selections = ("*",)
    exclude: Selections = ()
    tied: bool = False
    claim: Claim = follows()
    scheme: Int4Scheme = "symmetric"
    activations: Int4Activations = "float"
    name: ClassVar[str] = "int4-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def conflict(self) -> Conflict | None:
        """What fits zero points needs some."""
        if self.scheme == "affine" or self.weights not in _AFFINE_ALONE:
            return None
        return Conflict(
            ("scheme", "weights"),
            f"weights={self.weights!r} fits zero points, which symmetric groups have none of; give "
            "scheme='affine', or weights='nearest', 'gptq', 'awq' or 'awq-gptq'",
        )

    def default_claim(self) -> Claim:
        """The floor of the scheme."""
        return _FLOOR[self.scheme]

    @property
    def selection(self) -> Scheme:
        """The selection of layers, as every weight-only pass has it."""
        return Scheme("weight_only", "symmetric", None, self.include, self.exclude, self.tied)

    def group_of(self, inner: int) -> int | None:
        """The input channels that share a scale in a layer of `inner`; None where none fits."""
        return next((group for group in self.groups if inner % group == 0), None)

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that are tried, the wanted one first."""
        return _GROUPS[self.scheme] if self.group is None else (self.group,)

    @property
    def rounding(self) -> Rounding:
        """How a weight becomes four bits."""
        return Rounding(self.scheme, self.weights, repr(self))

    def plan(self, program: Program) -> Int4Plan:
        """The linears that will be rewritten, and why the others will not."""
        rule, rounding = QuantizeInt4Linear(self), self.rounding
        plan = plan_rules(program, (rule,), repr(self))
        if not rounding.needs_inputs or not plan.sites:
            return Int4Plan(plan.spec, plan.sites, plan.refusals)
        warnings: dict[str, None] = {}
        linears = self._with_groups(chosen_linears(program, rule, plan.sites))
        scales: tuple[Smoothing, ...] = ()
        details: tuple[str, ...] = ()
        if rounding.scales:
            scales, details = choose_scales(rounding, program, linears, warnings)
            program, renamed = scaled(program, scales)
            sites = [replace(one, node=renamed.get(one.node, one.node)) for one in plan.sites]
            linears = self._with_groups(chosen_linears(program, rule, sites))
        # The second look at the same inputs has nothing to add to what the first one warned of.
        again: dict[str, None] = {}
        weights = round_by_inputs(rounding, program, linears, again)
        warnings = warnings or again
        return Int4Plan(
            plan.spec,
            plan.sites,
            plan.refusals,
            warnings=tuple(warnings),
            details=details,
            scales=scales,
            weights=weights,
        )

    def apply(self, program: Program, plan: Int4Plan) -> Program:
        """Rewrite the plan's linears, sparing its excluded nodes.

        Scales are put in as one: they are exact whatever is rounded, and a weight is rounded for
        those of its neighbours too.
        """
        excluded = plan.excluded
        if plan.scales and plan.sites:
            program, renamed = scaled(program, plan.scales)
            excluded = frozenset(renamed.get(name, name) for name in excluded)
        return rewrite(program, (QuantizeInt4Linear(self, plan.weights),), excluded)

    def _with_groups(self, linears: Sequence[Linear]) -> list[tuple[Linear, int]]:
        groups = ((linear, self.group_of(linear.in_features)) for linear in linears)
        return [(linear, group) for linear, group in groups if group is not None]
