"""SmoothQuant: outliers of activations moved into the weights, before both are quantized.

    x @ Wᵀ + b  =  (x / s) @ (W * s)ᵀ + b          s: one positive scale per input channel

Exact in real arithmetic for any s. Linears that share x share s. The division costs nothing where
what computes x can take it: a norm's weight, a linear's output channels, also through attention, a
gate or a relu in between (`fxopt.analyses.channel_scaling`); elsewhere it stays as a multiply.
Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, fx

from fxopt.analyses.channel_scaling import Absorption
from fxopt.claim import Claim, Close
from fxopt.nodes import label, origins
from fxopt.observation.observation import calibration_warnings, observe
from fxopt.observation.observers import ChannelMagnitude, Observer, Rows
from fxopt.operators.linears import Linear
from fxopt.passes.linear_layers.linear_rule import check_unquantized, rows_of
from fxopt.passes.linear_layers.selection import (
    refuse_by_path,
    refuse_weight,
)
from fxopt.passes.quantization.quantize_linear import Range, bits_of
from fxopt.passes.quantization.scaled_groups import Group, scaled_groups
from fxopt.passes.quantization.smoothing_rule import SMOOTHED, Smoothing, SmoothLinear
from fxopt.program import Program, Refusal
from fxopt.rewriting import Pass, Plan, Site, Stage, rewrite
from fxopt.rewriting.option_annotations import Globs
from fxopt.rewriting.option_types import Bounds
from fxopt.weights.smoothing import choose_alpha, largest_per_channel, smoothing_scale

_SAMPLE_ROWS, _SAMPLE_CHANNELS = 256, 1024


@dataclass(frozen=True)
class SmoothPlan(Plan):
    """Which groups of linears are smoothed by which scales; `reasons` by node why others aren't."""

    groups: tuple[Smoothing, ...] = field(default=(), repr=False, compare=False)
    reasons: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class SmoothQuant(Pass[SmoothPlan]):
    """Outliers of activations moved into the weights of linears, for int8 that comes after.

    `alpha` in [0, 1] says how far: 0 leaves the activations' outliers, 1 moves them whole;
    `"auto"` tries several on a sample of each input and takes the one of least int8 error, or
    none, as `Int8Linear` of this `mode` rounds the input: `"static"` has one scale for all tokens
    and gains by more smoothing; `range` is that of its weights. `include` and `exclude` are globs
    over module paths. Scales come from the calibration inputs, or from the example where none were
    given, with a warning. What is smoothed already, a second run leaves alone.

    Claim: close. Raises `PassError` for another alpha or mode, and when it comes after a pass that
    quantized linears.
    """

    alpha: Annotated[float, Bounds(least=0, most=1)] | Literal["auto"] = 0.5
    include: Globs = ("*",)
    exclude: Globs = ()
    mode: Literal["dynamic", "static"] = "dynamic"
    range: Range = "auto"
    name: ClassVar[str] = "smooth-quant"
    stage: ClassVar[Stage] = Stage.NUMERICS
    claim: Claim = Close()

    def plan(self, program: Program) -> SmoothPlan:
        """The groups of linears and their scales, learnt from the program's calibration."""
        return _Planning(self, program).plan()

    def apply(self, program: Program, plan: SmoothPlan) -> Program:
        """Scale weights and what computes their inputs; a group is spared with its first linear."""
        groups = [group for group in plan.groups if plan.excluded.isdisjoint(group.linears)]
        return rewrite(program, (SmoothLinear(groups, plan.reasons),), plan.excluded)


class _Planning:
    """One plan in the making."""

    def __init__(self, options: SmoothQuant, program: Program) -> None:
        self.options = options
        self.program = program
        self.reasons: dict[str, str] = {}
        self.details: list[str] = []
        self.row_factors: dict[fx.Node, Tensor] = {}
        self.observers: dict[fx.Node, tuple[ChannelMagnitude, Rows]] = {}

    def plan(self) -> SmoothPlan:
        nodes = self.program.graph.nodes
        check_unquantized(self.program, repr(self.options), "smooth")
        groups, self.reasons = scaled_groups(self.program, self._reason_to_refuse)
        warnings = self._observe(groups) if groups else ()
        # From the end, since a scale that a linear's rows absorb changes its own columns' largest.
        found = [self._smoothing(group) for group in reversed(groups)][::-1]
        chosen = tuple(smoothing for smoothing in found if smoothing is not None)
        names = {name for smoothing in chosen for name in smoothing.linears}
        sites = [Site("SmoothLinear", n.name, label(n)) for n in nodes if n.name in names]
        refusals = dict.fromkeys(
            Refusal(self.reasons[n.name], label(n)) for n in nodes if n.name in self.reasons
        )
        return SmoothPlan(
            repr(self.options),
            tuple(sites),
            tuple(refusals),
            warnings=warnings,
            details=tuple(reversed(self.details)),
            groups=chosen,
            reasons=self.reasons,
        )

    def _reason_to_refuse(self, linear: Linear) -> str | None:
        unfit = refuse_by_path(linear, self.options.include, self.options.exclude)
        unfit = unfit or refuse_weight(linear)
        if unfit is not None:
            return unfit
        if linear.x.op == "get_attr":
            return "its input is a constant"
        if SMOOTHED in origins(linear.weight):
            return "it is smoothed already"
        return None

    def _observe(self, groups: Sequence[Group]) -> tuple[str, ...]:
        layers: dict[str, Sequence[Observer]] = {}
        for group in groups:
            for x in group.inputs:
                self.observers[x] = ChannelMagnitude(), Rows(_SAMPLE_ROWS)
            layers[group.name] = [self.observers[x][0] for x in group.inputs]
        auto = self.options.alpha == "auto"
        watched = {x: seen if auto else seen[:1] for x, seen in self.observers.items()}
        return calibration_warnings(observe(self.program, watched), layers)

    def _smoothing(self, group: Group) -> Smoothing | None:
        activations = torch.stack(
            [self._largest(x, group.linears[0].in_features) for x in group.inputs]
        ).amax(0)
        largest, samples = self._weights(group)
        if not bool(largest.isfinite().all()):
            return self._leave(group, "its weight holds NaN or infinity")
        home = group.home if isinstance(group.home, Absorption) else None
        ties = home.ties if home is not None else torch.arange(len(largest))
        alpha = self.options.alpha
        if alpha == "auto":
            rows = torch.cat([self.observers[x][1].rows.float().cpu() for x in group.inputs])
            static = self.options.mode == "static"
            bits = bits_of(self.options.range, group.linears)
            chosen = choose_alpha(rows, samples, activations, largest, ties, static, bits)
            if chosen is None:
                return self._leave(group, "no alpha makes its int8 product truer on calibration")
            alpha = chosen
        scale = smoothing_scale(activations, largest, ties, float(alpha))
        if bool((scale == 1.0).all()):
            return self._leave(group, "calibration gives its channels no difference to level")
        smoothing = Smoothing(
            tuple(linear.node.name for linear in group.linears),
            scale.reciprocal().to(group.linears[0].dtype),
            home is not None,
        )
        self._note(group, float(alpha), scale)
        if home is not None:
            self.row_factors[home.producer] = smoothing.factors(home.channels)
        return smoothing

    def _largest(self, x: fx.Node, channels: int) -> Tensor:
        seen = self.observers[x][0].largest
        return seen.double().cpu() if len(seen) else torch.zeros(channels, dtype=torch.float64)

    def _weights(self, group: Group) -> tuple[Tensor, list[Tensor]]:
        """The largest magnitude per input channel of all weights, and samples of their rows."""
        largest: Tensor | None = None
        samples = []
        for linear in group.linears:
            rows = rows_of(self.program, linear).cpu()
            if linear.node in self.row_factors:
                rows = rows * self.row_factors[linear.node].to(rows)[:, None]
            found = largest_per_channel(rows)
            largest = found if largest is None else torch.maximum(largest, found)
            if self.options.alpha == "auto":
                samples.append(rows[:: -(-len(rows) // _SAMPLE_CHANNELS)].float())
        assert largest is not None
        return largest, samples

    def _leave(self, group: Group, reason: str) -> Smoothing | None:
        self.reasons.update({linear.node.name: reason for linear in group.linears})
        return None

    def _note(self, group: Group, alpha: float, scale: Tensor) -> None:
        low, high = float(scale.min()), float(scale.max())
        self.details.append(
            f"{group.name}: alpha {alpha:g}, scales {low:.3g} to {high:.3g}, {group.place}"
        )
