"""Int4Linear: linear layers on int4 weights, at the numerics level: where values are rounded.

    x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b        q: one scale per output channel and group of inputs

q(v) = clamp(round(v / s), -7, 7) with s = max|v| / 7 over the group, dq(v) = v * s. The graph holds
plain unpack / dequantize / linear; `SelectInt4Linear` turns each region into one product:

    linear(x, view(dq(view(unpack_int4(P)), s)), b)  =  int4_weight_only_linear(x, P, s, b)

A weight takes 4 bits and a float32 scale per group: 4.25 bits at 128. It saves memory; it saves
time where few rows in bfloat16 meet it, as in the decoding of a language model.
Source: Frantar et al., "GPTQ", ICLR 2023; groups: Shen et al., "Q-BERT", AAAI 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Sqnr
from fxopt.constant_expressions import stored
from fxopt.errors import KernelError, PassError
from fxopt.kernels import pack_int4
from fxopt.nodes import label
from fxopt.operators import Linear
from fxopt.passes.linear_layers.linear_rule import chosen_linears
from fxopt.passes.linear_layers.selection import Selections
from fxopt.passes.linear_layers.weight_inputs import watch_moments
from fxopt.passes.quantization.quantize_linear import QuantizeLinear, Scheme, WeightKey, weight_key
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
from fxopt.weights import quantize_rows
from fxopt.weights.gptq import Rounding

aten, ops = torch.ops.aten, torch.ops.fxopt

Packed = tuple[Tensor, Tensor]
"""A weight: uint8 [N, K/2] and float32 scales [N, K/g, 1]."""

_GROUPS = (128, 64, 32)
_BITS = 4


class QuantizeInt4Linear(QuantizeLinear):
    """x @ Wᵀ + b ~ x @ dq(q(W))ᵀ + b"""

    def __init__(
        self, options: Int4Linear, ahead: Mapping[WeightKey, Packed] | None = None
    ) -> None:
        super().__init__(options.scheme)
        self.options = options
        self.ahead = ahead or {}

    def refuse(self, match: Match) -> str | None:
        reason = super().refuse(match)
        inner = match["linear"].in_features
        if reason is not None or self.options.group_of(inner) is not None:
            return reason
        wanted = _GROUPS if self.options.group is None else (self.options.group,)
        return f"its K = {inner} is no multiple of {' or '.join(map(str, sorted(wanted)))}"

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        packed, scale = edit.once((self, weight_key(linear)), lambda: self._constants(linear, edit))
        rows, groups, _ = scale.meta["val"].shape
        q = edit.call(ops.unpack_int4.default, packed)
        q = edit.call(aten.view.default, q, [rows, groups, linear.in_features // groups])
        dense = edit.call(ops.dequantize.default, q, scale, linear.dtype)
        dense = edit.call(aten.view.default, dense, [rows, linear.in_features])
        return edit.call(aten.linear.default, linear.x, dense, linear.bias)

    def _constants(self, linear: Linear, edit: Edit) -> tuple[fx.Node, ...]:
        """The packed weight and its scales."""
        values = self.ahead.get(weight_key(linear))
        if values is None:
            rows = materialize(linear.weight_nk(edit.state(linear.weight)))
            values = self.options.round(linear, rows, None)
        packed, scale = values
        return (
            edit.constant(f"{linear.name}_int4", packed),
            edit.constant(f"{linear.name}_scale", scale),
        )


class SelectInt4Linear(Rule):
    """linear(x, view(dq(view(unpack_int4(P)), s)), b) = int4_weight_only_linear(x, P, s, b)"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        hole("x"),
        op(
            aten.view.default,
            op(
                ops.dequantize.default,
                op(
                    aten.view.default,
                    op(ops.unpack_int4.default, constant("packed")),
                    hole("grouped"),
                ),
                constant("scale"),
                hole("weight_dtype"),
            ),
            hole("shape"),
        ),
        hole("bias"),
    )

    def refuse(self, match: Match) -> str | None:
        (rows, half), scale = match["packed"].meta["val"].shape, match["scale"].meta["val"].shape
        shapes = list(match["shape"]), list(match["grouped"]), list(scale)
        groups = scale[1] if len(scale) == 3 else 1
        wanted = [rows, 2 * half], [rows, groups, 2 * half // groups], [rows, groups, 1]
        return None if shapes == wanted else "its scales are not one for each group of columns"

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("x", "packed", "scale", "bias")
        return edit.call(ops.int4_weight_only_linear.default, *(match[name] for name in names))


@dataclass(frozen=True)
class Int4Plan(Plan):
    """A plan with the weights that calibration rounded."""

    weights: Mapping[WeightKey, Packed] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class Int4Linear(Pass[Int4Plan]):
    """Linear layers on symmetric int4 weights, two a byte; activations stay as they are.

    Each `group` input channels of an output channel have a scale; left out, it is the largest of
    128, 64 and 32 that divides their number, and a layer that none divides is refused.
    `weights="gptq"` rounds with error feedback from `transform(calibration=)`, all layers on the
    inputs that the unrounded model gives them, columns of large inputs first; `"nearest"` without.

    `include` and `exclude` are globs over module paths (`"encoder.layer.*.output.dense"`) or
    functions of the path. A weight that an embedding reads too is left alone unless `tied=True`.
    Claim: a signal-to-noise ratio of the model's outputs, 5 dB unless `claim` gives another.

    Raises `PassError` for other options and for a weight that holds NaN or infinity.
    """

    group: Annotated[
        Annotated[int, Bounds(least=2, multiple_of=2)] | None,
        Give(
            "an even number of input channels, such as 128, 64 or 32, or None for the largest of "
            "these that fits"
        ),
    ] = None
    weights: Rounding = "nearest"
    include: Selections = ("*",)
    exclude: Selections = ()
    tied: bool = False
    claim: Claim = Sqnr(5.0)  # the table of architectures, with random weights, keeps 5.9 dB
    name: ClassVar[str] = "int4-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    @property
    def scheme(self) -> Scheme:
        """The selection of layers, as every weight-only pass has it."""
        return Scheme("weight_only", "symmetric", None, self.include, self.exclude, self.tied)

    def group_of(self, inner: int) -> int | None:
        """The input channels that share a scale in a layer of `inner`; None where none fits."""
        wanted = _GROUPS if self.group is None else (self.group,)
        return next((group for group in wanted if inner % group == 0), None)

    def round(self, linear: Linear, rows: Tensor, moment: Tensor | None) -> Packed:
        """The weight `rows` [N, K] of a layer in four bits; with feedback where `moment` is given.

        Raises `PassError`, naming the layer, for NaN and infinity.
        """
        try:
            q, scale = quantize_rows(
                rows.detach(),
                bits=_BITS,
                group=self.group_of(linear.in_features),
                method="nearest" if moment is None else "gptq",
                second_moment=moment,
                order=True,
            )
        except KernelError as error:
            raise PassError(f"{label(linear.node)}: {error}; exclude= takes it out") from error
        return pack_int4(q), scale.unsqueeze(-1)

    def plan(self, program: Program) -> Int4Plan:
        """The linears that will be rewritten, and why the others will not."""
        rule = QuantizeInt4Linear(self)
        plan = plan_rules(program, (rule,), repr(self))
        if self.weights == "nearest" or not plan.sites:
            return Int4Plan(plan.spec, plan.sites, plan.refusals)
        linears = chosen_linears(program, rule, plan.sites)
        weights, warnings = _round_by_inputs(self, program, linears)
        return Int4Plan(
            plan.spec, plan.sites, plan.refusals, warnings=tuple(warnings), weights=weights
        )

    def apply(self, program: Program, plan: Int4Plan) -> Program:
        """Rewrite the plan's linears, sparing its excluded nodes."""
        return rewrite(program, (QuantizeInt4Linear(self, plan.weights),), plan.excluded)


def _round_by_inputs(
    options: Int4Linear, program: Program, linears: Sequence[Linear]
) -> tuple[dict[WeightKey, Packed], dict[str, None]]:
    """The weights of `linears` rounded with feedback, and what calibration warns of."""
    rounded: dict[WeightKey, Packed] = {}
    warnings: dict[str, None] = {}
    without = "weights='nearest'"
    for layers, moment in watch_moments(program, linears, warnings, "the nearest", without):
        for linear in layers:
            rows = materialize(linear.weight_nk(stored(program, linear.weight)))
            matrix = moment.matrix if moment.rows else None
            rounded[weight_key(linear)] = options.round(linear, rows, matrix)
    return rounded, warnings
