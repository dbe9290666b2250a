"""HalfLinear: linear layers and convolutions in half precision, summed in float32.

    op(x, W, b)  ~  float32(op(half(x), half(W), half(b)))       half: bfloat16 or float16
    half(copy(float32(y)))  =  copy(y)                           for y in half already

Rounding to bfloat16 errs by 2⁻⁹ of a value at most, to float16 by 2⁻¹²; in a sum of products the
errors average out. Between two layers no cast is left where only views, a relu or a max pooling
lie. What else lies between stays in float32; `Autocast` decides about that as well.

`weight_only` stores weights of linears so and computes in float32: see `half_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fxopt.claim import Claim, Close, Sqnr
from fxopt.nodes import module_path
from fxopt.observation import Extremes, extremes, past_range
from fxopt.operators import (
    CONVOLUTIONS,
    PRODUCT_TARGETS,
    TRANSPOSED_CONVOLUTIONS,
    as_linear,
    reads_as_linear,
    refuse_shared_weight,
    why_no_linear,
)
from fxopt.passes.linear_layers.selection import refuse_path
from fxopt.passes.mixed_precision.half_choice import HalfDtype, half_choice
from fxopt.passes.mixed_precision.half_precision import CancelCasts, ComputeInHalf
from fxopt.passes.mixed_precision.half_values import HALF
from fxopt.passes.mixed_precision.half_weights import HalfWeights, with_fits
from fxopt.program import Mode, Program
from fxopt.rewriting import Match, Pass, Plan, Rule, Stage, arguments, plan_rules, rewrite
from fxopt.rewriting.option_annotations import DeviceOption, Globs
from fxopt.rewriting.options import Conflict, follows
from fxopt.rewriting.pattern import Target

aten = torch.ops.aten

_CONVOLUTIONS: tuple[Target, ...] = (
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    aten.convolution.default,
)

_FLOOR: Mapping[HalfDtype, Claim] = {
    "auto": Sqnr(30.0),
    torch.bfloat16: Sqnr(30.0),
    torch.float16: Sqnr(45.0),
}
"""Decibels end to end. The table of architectures, with random weights, keeps 35 dB in bfloat16 and
53 dB in float16, which has 3 bits of mantissa, 18 dB, more; a dropped bias falls below."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution: its node, its operands, and whether it is a linear one."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_linear: bool

    @property
    def parts(self) -> dict[fx.Node, str]:
        """What must be within the range of half precision, and how a message introduces it."""
        named = {self.x: f"its input {self.x.name}: ", self.weight: f"its weight {self.weight}: "}
        if self.bias is not None:
            named[self.bias] = f"its bias {self.bias}: "
        return {**named, self.node: ""}


def as_layer(node: fx.Node, computed: bool) -> Layer | None:
    """The linear layer or convolution that `node` computes, or None.

    With `computed`, weights that are computed from state alone count as well.
    """
    linear = as_linear(node, computed)
    if linear is not None:
        return Layer(node, linear.x, linear.weight, linear.bias, True)
    if node.target not in _CONVOLUTIONS:
        return None
    given = arguments(node)
    return Layer(node, given["input"], given["weight"], given["bias"], False)


@dataclass(frozen=True)
class HalfPlan(Plan):
    """A plan with the dtype, or why there is none, and the layers that leave its range; or, with
    `weight_only`, the `weights` that are stored in which."""

    choice: torch.dtype | str = torch.bfloat16
    past: Mapping[str, str] = field(default_factory=dict)
    weights: HalfWeights | None = None


class RoundLayer(ComputeInHalf):
    """op(x, W, b) ~ float32(op(half(x), half(W), half(b)))"""

    def __init__(
        self, options: HalfLinear, choice: torch.dtype | str, past: Mapping[str, str], mode: Mode
    ) -> None:
        super().__init__((), choice if isinstance(choice, torch.dtype) else torch.bfloat16)
        self.options, self.choice, self.past, self.mode = options, choice, past, mode

    def targets(self) -> tuple[Target, ...]:
        return (*PRODUCT_TARGETS, *_CONVOLUTIONS)

    def match(self, node: fx.Node) -> Match | None:
        layer = as_layer(node, self.mode == "eval")
        if layer is None and node.target in PRODUCT_TARGETS:
            if node.meta["val"].dtype in HALF:
                return None
            reason = why_no_linear(node, self.mode)
            return None if reason is None else Match((node,), {"node": node, "no_linear": reason})
        if layer is None or layer.weight.meta["val"].dtype in HALF:
            return None
        return Match((node,), {"node": node, "layer": layer})

    def refuse(self, match: Match) -> str | None:
        if "no_linear" in match.bound:
            return str(match["no_linear"])
        layer: Layer = match["layer"]
        path = module_path(layer.node)
        unfit = refuse_path(path, self.options.include, self.options.exclude)
        unfit = unfit or _refuse_weight(layer) or super().refuse(match)
        if unfit is not None:
            return unfit
        if isinstance(self.choice, str):
            return self.choice
        return self._refuse_tied(layer) or self.past.get(layer.node.name)

    def _refuse_tied(self, layer: Layer) -> str | None:
        """In train mode the weight stays one parameter, whoever reads it."""
        linear = as_linear(layer.node, computed=True)
        if linear is None or self.options.tied or self.mode == "train":
            return None
        return refuse_shared_weight(linear, reads_as_linear)


@dataclass(frozen=True, repr=False)
class HalfLinear(Pass[HalfPlan]):
    """Linear layers and convolutions in half precision, their weights stored in it once.

    `dtype="auto"` takes what `device` multiplies natively: bfloat16, or float16 where only that is.
    A dtype that the device emulates is refused with the reason, unless `force=True`; then `"auto"`
    is bfloat16. `device` is a description such as "cuda:8.0" or "cpu:avx512_bf16", in place of the
    device that the model is on. `include` and `exclude` are globs over module paths
    (`"encoder.layer.*.output.dense"`). A weight that an embedding reads too would be stored twice
    and is left alone unless `tied=True`. In train mode weights stay float32, the master copies, and
    are rounded at each call.

    With float16 a layer is left alone, and named, whose input, weight or output leaves its range on
    the calibration inputs, or on the example where there are none.

    `weight_only=True` stores the weights of linears alone in half precision and computes in float32
    as before: half the memory, and half of the time that few rows take, as in the decoding of a
    language model. A weight that half precision doesn't hold exactly is left alone, and named;
    `lossless=False` rounds it. `dtype="auto"` is then what changes the fewest values of a weight,
    on any device. A table that an embedding and a linear share is stored once, for both.

    Claim: a signal-to-noise ratio of the outputs, 45 dB for float16 and 30 dB otherwise, and close
    for weights alone that lose nothing, unless `claim` gives another.

    Raises `PassError` for options that don't exist.
    """

    dtype: HalfDtype = "auto"
    include: Globs = ("*",)
    exclude: Globs = ()
    tied: bool = False
    force: bool = False
    device: DeviceOption = None
    claim: Claim = follows()
    weight_only: bool = False
    lossless: bool = True
    name: ClassVar[str] = "half-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def conflict(self) -> Conflict | None:
        """Options of one of the two ways to be in half precision with the other."""
        if not self.weight_only and not self.lossless:
            text = (
                "all that is computed in half precision is rounded; give weight_only=True with it"
            )
            return Conflict(("lossless", "weight_only"), text)
        if self.weight_only and (self.force or self.device is not None):
            text = "no device multiplies in half precision then; leave device and force out"
            return Conflict(("weight_only", "device", "force"), text)
        return None

    def default_claim(self) -> Claim:
        """What the dtype keeps, or all but the order of sums."""
        return Close() if self.weight_only and self.lossless else _FLOOR[self.dtype]

    def plan(self, program: Program) -> HalfPlan:
        """The layers that will be in half precision, in which, and why the others will not."""
        if self.weight_only:
            return self._weights_plan(program)
        choice = half_choice(program, self.dtype, self.device, self.force)
        past: dict[str, str] = {}
        warnings: tuple[str, ...] = ()
        if choice is torch.float16:
            past, warnings = self._past_range(program)
        base = plan_rules(program, self._rules(program, choice, past), repr(self))
        details = () if isinstance(choice, str) or not base.sites else (f"half is {choice}",)
        return HalfPlan(
            base.spec, base.sites, base.refusals, frozenset(), warnings, details, choice, past
        )

    def apply(self, program: Program, plan: HalfPlan) -> Program:
        """Round the plan's layers, sparing its excluded nodes."""
        if plan.weights is not None:
            return rewrite(program, plan.weights.rules(), plan.excluded)
        return rewrite(program, self._rules(program, plan.choice, plan.past), plan.excluded)

    def _weights_plan(self, program: Program) -> HalfPlan:
        options = HalfWeights(self.include, self.exclude, self.tied, self.lossless)
        weights = with_fits(options, program, HALF if self.dtype == "auto" else (self.dtype,))
        base = plan_rules(program, weights.rules(), repr(self))
        details = tuple(weights.lines())
        return HalfPlan(base.spec, base.sites, base.refusals, details=details, weights=weights)

    def _rules(
        self, program: Program, choice: torch.dtype | str, past: Mapping[str, str]
    ) -> Sequence[Rule]:
        layers = RoundLayer(self, choice, past, program.mode)
        return (layers, CancelCasts(layers.dtype))

    def _past_range(self, program: Program) -> tuple[dict[str, str], tuple[str, ...]]:
        """Why layers can't be in float16, by their nodes' names; and what makes that doubtful."""
        rules = self._rules(program, torch.float16, {})
        chosen = {site.node for site in plan_rules(program, rules[:1], "").sites}
        layers = [as_layer(node, True) for node in program.graph.nodes if node.name in chosen]
        parts = {layer.node: layer.parts for layer in layers if layer is not None}
        found = extremes(program, (part for named in parts.values() for part in named))
        return _reasons(parts, found), found.warnings


def _reasons(parts: Mapping[fx.Node, Mapping[fx.Node, str]], found: Extremes) -> dict[str, str]:
    past = past_range(found, torch.float16)
    return {
        node.name: "; ".join(named[part] + past[part] for part in named if part in past)
        for node, named in parts.items()
        if any(part in past for part in named)
    }


def _refuse_weight(layer: Layer) -> str | None:
    weight = layer.weight.meta["val"]
    if layer.weight.op != "get_attr" and not layer.is_linear:
        return f"its weight {layer.weight.name} is computed, not constant"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}; only float32 is rounded to half precision"
    return None if weight.numel() else "its weight is empty"
