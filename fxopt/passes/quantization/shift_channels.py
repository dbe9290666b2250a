"""ShiftChannels: each input channel of a linear is centred, before it is quantized.

    x @ Wᵀ + b  =  (x - z) @ Wᵀ + (b + W z)          z: the middle of each channel's range [K]

Exact in real arithmetic for any z. One scale for all channels must hold all their ranges side by
side; centred, it holds the widest of them. The channels of a post-norm transformer's residual
stream are one-sided. The subtraction costs nothing where the compiler fuses it with the norm before
and the rounding after it.
Source: Wei et al., "Outlier Suppression+: Accurate Quantization of Large Language Models by
Equivalent and Effective Shifting and Scaling", EMNLP 2023, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Close
from fxopt.nodes import origins
from fxopt.observation import ChannelRange
from fxopt.operators import Linear
from fxopt.passes.linear_layers.linear_rule import (
    JudgedPlan,
    LinearRule,
    check_unquantized,
    judged_plan,
)
from fxopt.passes.linear_layers.selection import (
    refuse_by_path,
    refuse_weight,
)
from fxopt.passes.quantization.smoothing_rule import rebuilt, weight_operand
from fxopt.program import Mode, Origin, Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Pass, Stage, rewrite
from fxopt.rewriting.option_annotations import Globs
from fxopt.rewriting.option_types import Bounds

aten = torch.ops.aten

SHIFT = Origin("shift-channels", "shift")
"""What is subtracted from an input."""


class ShiftLinear(LinearRule):
    """x @ Wᵀ + b = (x - z) @ Wᵀ + (b + W z)"""

    def __init__(
        self,
        options: ShiftChannels,
        mode: Mode,
        middles: Mapping[str, Tensor],
        reasons: Mapping[str, str],
    ) -> None:
        self.options, self.mode = options, mode
        self.middles, self.reasons = middles, reasons

    def match(self, node: fx.Node) -> Match | None:
        match = super().match(node)
        return None if match is None or _is_shifted(match["linear"].x) else match

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        unfit = refuse_by_path(linear, self.options.include, self.options.exclude)
        unfit = unfit or refuse_weight(linear)
        if unfit is None and linear.x.meta["val"].dtype != linear.dtype:
            unfit = f"it multiplies {linear.x.meta['val'].dtype} by {linear.dtype}"
        if unfit is None and self.mode == "train":
            unfit = "it trains, and the weight's part in the new bias would have no gradient"
        if unfit is None and linear.bias is not None and linear.bias.op != "get_attr":
            unfit = "its bias is computed"
        return unfit or self.reasons.get(linear.node.name)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        middle = self.middles[linear.node.name]
        bias = edit.constant(f"{linear.weight.target}_shifted_bias", _bias(linear, middle, edit))
        x = edit.once((self, linear.x), lambda: _centred(linear.x, middle, edit))
        if linear.bias is not None:
            return rebuilt(edit, linear.node, {linear.x: x, linear.bias: bias})
        if linear.node.target is aten.linear.default:
            return edit.call(aten.linear.default, x, weight_operand(linear), bias)
        return edit.call(aten.add.Tensor, rebuilt(edit, linear.node, {linear.x: x}), bias)


class ShiftPlan(JudgedPlan):
    """A plan that has found the channels' middles."""


@dataclass(frozen=True, repr=False)
class ShiftChannels(Pass[ShiftPlan]):
    """Each input channel of a linear centred on 0, for `Int8Linear` after it.

    Where, by `transform(calibration=)`, the range of all channels together gets narrower by at
    least the share `gain`: rounding errs by so much less. After `SmoothQuant`, whose scales say how
    wide each channel is. `include` and `exclude` are globs over module paths. Claim: close; exact
    in real arithmetic.

    Raises `PassError` for a gain outside of (0, 1), and when it comes after a pass that quantized
    linears.
    """

    gain: Annotated[float, Bounds(above=0, below=1)] = 0.1
    include: Globs = ("*",)
    exclude: Globs = ()
    claim: Claim = Close()
    name: ClassVar[str] = "shift-channels"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def plan(self, program: Program) -> ShiftPlan:
        """The linears whose input gets narrower, with the middles of its channels."""
        check_unquantized(program, repr(self), "shift")
        make, rule = partial(ShiftPlan, repr(self)), partial(ShiftLinear, self, program.mode)
        return judged_plan(program, make, rule, ChannelRange, self._middle)

    def apply(self, program: Program, plan: ShiftPlan) -> Program:
        """Shift the inputs of the plan's linears."""
        rule = ShiftLinear(self, program.mode, plan.found, plan.reasons)
        return rewrite(program, (rule,), plan.excluded)

    def _middle(self, seen: ChannelRange) -> tuple[Tensor | None, str]:
        """The middle of each channel and by how much the range shrinks, or why it is left."""
        if not seen.count:
            return None, "its input was never seen"
        low, high = float(seen.low.amin().clamp_max(0)), float(seen.high.amax().clamp_min(0))
        # Halved first: the difference of two large numbers must not overflow.
        half = (seen.high / 2 - seen.low / 2).amax()
        share = float(2 * half / (high - low)) if high > low else 1.0
        if share > 1.0 - self.gain:
            return (
                None,
                f"centred, its range is {share:.2f} of what it was, above {1 - self.gain:g}",
            )
        return seen.high / 2 + seen.low / 2, f"centred, its range is {share:.2f} of what it was"


def _is_shifted(x: fx.Node) -> bool:
    if x.target is not aten.sub.Tensor:
        return False
    shift = x.args[1]
    return isinstance(shift, fx.Node) and SHIFT in origins(shift)


def _centred(x: fx.Node, middle: Tensor, edit: Edit) -> fx.Node:
    value = x.meta["val"]
    rounded = middle.to(value.dtype).to(value.device)
    shift = edit.constant(f"{x.name}_shift", rounded, origin=SHIFT)
    return edit.call(aten.sub.Tensor, x, shift)


@dataclass(frozen=True)
class _ShiftedBias:
    """b + W z, in float32 or wider."""

    middle: Tensor

    def __call__(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        shifted = rows.to(wide) @ self.middle.to(wide).to(rows.device)
        return (shifted if bias is None else shifted + bias.to(wide)).to(rows.dtype)


def _bias(linear: Linear, middle: Tensor, edit: Edit) -> Recipe:
    rows = linear.weight_nk(edit.state(linear.weight))
    sources = (rows,) if linear.bias is None else (rows, edit.state(linear.bias))
    shape = torch.Size((linear.out_features,))
    return Recipe(_ShiftedBias(middle), sources, shape, rows.dtype, rows.device)
