"""Int8Linear: linear layers on int8 weights, at the numerics level: where values are rounded.

    weight_only   x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b            q: one scale per output channel
    dynamic       x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b     q(x): a scale per token, at run time,
                                                              or per token and group
    static        x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b     q(x): one scale, from calibration

Symmetric: q(v) = clamp(round(v / s), -127, 127), s = max|v| / 127, dq(v) = v * s; affine spends
all 256 steps on [min, max]. The graph holds plain quantize / dequantize / linear; a kernel pass
turns each region into one int8 product.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018); per-token scales: Yao et al., "ZeroQuant" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from fxopt.analyses.precision import INT8_ACTIVATIONS
from fxopt.analyses.sensitivity import Sensitivity
from fxopt.claim import Claim, Sqnr
from fxopt.observation import RangeMethod
from fxopt.passes.linear_layers.selection import Selections
from fxopt.passes.quantization.int8_planning import Int8Plan, make_plan
from fxopt.passes.quantization.quantize_linear import (
    Activations,
    Int8Mode,
    QuantizeLinear,
    Range,
    Scheme,
)
from fxopt.program import Program
from fxopt.rewriting import Pass, Stage, rewrite
from fxopt.rewriting.option_types import Bounds
from fxopt.rewriting.options import Conflict, follows

_FLOOR = {"dynamic": INT8_ACTIVATIONS, "static": Sqnr(10.0), "weight_only": Sqnr(26.0)}
"""Decibels end to end that every model of the architecture table keeps with random weights, which
are harder than trained ones; a dropped bias or a swapped channel falls below."""

_BELOW_BUDGET = 3.0
"""Decibels that inputs other than those which the layers were chosen on may cost."""

Where = Literal["faster", "always"]
Weights = Literal["nearest", "gptq"]


@dataclass(frozen=True, repr=False)
class Int8Linear(Pass[Int8Plan]):
    """Linear layers on symmetric int8 weights, one scale per output channel.

    `mode="dynamic"` also rounds each token of the input to int8 with a scale taken at run time;
    `"static"` rounds the input with one scale learnt from `transform(calibration=)`;
    `"weight_only"` leaves it as it is. `activations="affine"` (static: the default) adds a zero
    point to the input's scale. `observer` takes a static range from the values seen: `"minmax"` all
    of them, `"percentile"` 99.99 % of them, `"mse"` what has the least squared error. `group` gives
    each so many input channels their own scale: of a weight (weight-only), and of a token too
    (dynamic, symmetric), which serves the few rows of a step of generation. `weights="gptq"` rounds
    weights with error feedback from calibration, `"nearest"` without.

    `include` and `exclude` are globs over module paths (`"encoder.layer.*.output.dense"`) or
    functions of the path. A weight that an embedding reads too is left alone unless `tied=True`.
    By default only linears that are timed to be faster so on this machine, at the example's shapes,
    are rewritten; `where="always"` rewrites all. `budget` leaves the layers that cost most as they
    are, until the outputs keep that ratio on calibration inputs; `max_layers` leaves at most so
    many.

    `range` is how many bits of an int8 the weights use: 8, or 7, with which a CPU that has no int8
    dot product multiplies exactly at twice float32's speed; with 8 its products would saturate, so
    they are computed in float32 there. "auto" takes 7 on such a CPU where activations are rounded
    too, else 8; the plan says what 7 costs in decibels of the weights.

    Claim: a signal-to-noise ratio of the model's outputs, 16 dB dynamic, 10 dB static, 26 dB
    weight-only, 3 dB below `budget` where one is given, unless `claim` gives another.

    Raises `PassError` for options that don't exist or don't go together.
    """

    mode: Int8Mode = "dynamic"
    include: Selections = ("*",)
    exclude: Selections = ()
    tied: bool = False
    claim: Claim = follows()
    activations: Activations = follows()
    observer: RangeMethod = "minmax"
    group: Annotated[int, Bounds(least=1)] | None = None
    weights: Weights = "nearest"
    budget: Sqnr | None = None
    max_layers: Annotated[int, Bounds(least=0)] | None = None
    where: Where = "faster"
    range: Range = "auto"
    name: ClassVar[str] = "int8-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def conflict(self) -> Conflict | None:
        """Groups of input channels have scales that are taken at run time, and no zero points."""
        if self.group is None or self.mode == "weight_only":
            return None
        if self.mode == "static":
            return Conflict(
                ("group", "mode"),
                "a static input has one scale; give mode='weight_only' or 'dynamic' with group",
            )
        if self.activations == "affine":
            return Conflict(
                ("group", "activations"),
                "groups have no zero points; give activations='symmetric' with group",
            )
        return None

    def default_activations(self) -> Activations:
        """Affine where one scale serves all tokens, symmetric otherwise."""
        return "affine" if self.mode == "static" else "symmetric"

    def default_claim(self) -> Claim:
        """The floor of the mode, or a little below the budget where one is given."""
        if self.budget is None:
            return _FLOOR[self.mode]
        return Sqnr(max(self.budget.db - _BELOW_BUDGET, 1.0))

    def plan(self, program: Program) -> Int8Plan:
        """The linears that will be rewritten, with their scales, and why the others will not."""
        return make_plan(program, self._scheme(), self._needs(), repr(self))

    def apply(self, program: Program, plan: Int8Plan) -> Program:
        """Rewrite the plan's linears, sparing its excluded nodes."""
        return rewrite(program, (QuantizeLinear(plan.scheme),), plan.excluded)

    def advice(self) -> str | None:
        """The same pass with a budget that gives its claim, where it has none."""
        if self.budget is not None or not isinstance(self.claim, Sqnr):
            return None
        bounded = replace(self, budget=Sqnr(self.claim.db + _BELOW_BUDGET))
        return f"{bounded!r} leaves in float the layers that cost the outputs most"

    def sensitivity(self, program: Program) -> Sensitivity:
        """What rounding each group of linears costs at the outputs, alone and with all cheaper
        ones, on the first calibration inputs."""
        everything = replace(self, budget=None, max_layers=None, where="always")
        needs = {**everything._needs(), "table": True}
        plan = make_plan(program, everything._scheme(), needs, repr(everything))
        assert plan.sensitivity is not None
        return plan.sensitivity

    def _scheme(self) -> Scheme:
        return Scheme(
            self.mode, self.activations, self.group, self.include, self.exclude, self.tied
        )

    def _needs(self) -> dict[str, Any]:
        names = ("observer", "weights", "budget", "max_layers", "where", "range")
        return {name: getattr(self, name) for name in names}
