"""Float8Linear: linear layers in 8-bit floating point, at the numerics level.

    x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b        q(x): one scale per token, taken at run time
                                                   q(W): one scale per output channel

q(v) = e4m3(v / s) with s = max|v| / 448, dq(v) = v * s. The graph holds plain quantize /
dequantize / linear; `SelectFloat8Linear` turns each region into one product:

    linear(dq(q, s), dq(W, t), b)  =  float8_linear(q, s, W, t, b)

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxopt.claim import Claim, Sqnr
from fxopt.device import Device
from fxopt.kernels.float8 import FLOAT8, quantize_weight_float8
from fxopt.operators import Linear, reads_as_linear, refuse_shared_weight
from fxopt.passes.linear_layers.linear_rule import ProductRule
from fxopt.passes.linear_layers.selection import refuse_by_path, refuse_weight
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, constant, has_dtype, hole, op
from fxopt.rewriting.option_annotations import Globs

aten, ops = torch.ops.aten, torch.ops.fxopt


class QuantizeFloat8Linear(ProductRule):
    """x @ Wᵀ + b ~ dq(q(x)) @ dq(q(W))ᵀ + b"""

    def __init__(self, options: Float8Linear) -> None:
        self.options = options

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        unfit = refuse_by_path(linear, self.options.include, self.options.exclude)
        unfit = unfit or refuse_weight(linear)
        if unfit is not None:
            return unfit
        answer = Device.describe(linear.weight.meta["val"].device).accelerates(FLOAT8)
        if not answer and not self.options.force:
            return f"{answer.reason}; force=True does it all the same"
        return None if self.options.tied else refuse_shared_weight(linear, reads_as_linear)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        key = (self, linear.weight, linear.transposed)
        values, scale = edit.once(key, lambda: _rounded_weight(linear, edit))
        weight = edit.call(ops.dequantize.default, values, scale, linear.dtype)
        x = edit.once((self, linear.x), lambda: _rounded_input(linear.x, edit))
        return edit.call(aten.linear.default, x, weight, linear.bias)


def _rounded_input(x: fx.Node, edit: Edit) -> fx.Node:
    """dq(q(x))."""
    pair = edit.call(ops.quantize_float8.default, x)
    values, scale = edit.item(pair, 0), edit.item(pair, 1)
    return edit.call(ops.dequantize.default, values, scale, x.meta["val"].dtype)


def _rounded_weight(linear: Linear, edit: Edit) -> tuple[fx.Node, ...]:
    """The float8 weight [N, K] and its scale [N, 1]."""
    rows = linear.weight_nk(edit.state(linear.weight))
    values, scale = quantize_weight_float8(materialize(rows).detach())
    return (
        edit.constant(f"{linear.name}_float8", values),
        edit.constant(f"{linear.name}_scale", scale),
    )


class SelectFloat8Linear(Rule):
    """linear(dq(q, s), dq(W, t), b) = float8_linear(q, s, W, t, b) for float8 q and W"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        op(ops.dequantize.default, hole("q", has_dtype(FLOAT8)), hole("scale"), hole("dtype")),
        op(
            ops.dequantize.default,
            constant("weight", has_dtype(FLOAT8)),
            constant("weight_scale"),
            hole("weight_dtype"),
        ),
        hole("bias"),
    )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("q", "scale", "weight", "weight_scale", "bias", "dtype")
        return edit.call(ops.float8_linear.default, *(match[name] for name in names))


@dataclass(frozen=True, repr=False)
class Float8Linear(RulePass):
    """Linear layers on float8 (e4m3) weights and activations, dynamic per token, per channel.

    Refused on a device whose units don't take float8, with the reason, unless `force=True`: then
    the numbers are the same and the speed isn't. `include` and `exclude` are globs over module
    paths (`"encoder.layer.*.output.dense"`). A weight that an embedding reads too is left alone
    unless `tied=True`. Claim: a signal-to-noise ratio of the model's outputs, 10 dB unless `claim`
    gives another; e4m3 keeps 3 bits of mantissa where per-token int8 keeps up to 7.

    Raises `PassError` for globs that are no strings.
    """

    include: Globs = ("*",)
    exclude: Globs = ()
    tied: bool = False
    claim: Claim = Sqnr(10.0)  # the table of architectures, with random weights, keeps 13 dB
    force: bool = False
    name: ClassVar[str] = "float8-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for every spelling of a linear."""
        return (QuantizeFloat8Linear(self),)
