"""Sparsify24: of every four neighbouring weights of a linear layer two are kept (2:4 sparsity).

    x @ Wᵀ + b  ~  x @ (W * m)ᵀ + b        m keeps two of every four along K

Numerics level: a plain linear with a weight that holds zeros. Where the device has sparse tensor
cores, `SelectSparse24Linear` turns each such linear in half precision into one product that skips
them, on a weight of 9/16 of the bytes:

    linear(x, W, b)  =  linear_sparse24(x, V, P, b)        V: what is kept, P: where it stood

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Sqnr
from fxopt.device import Answer, Device
from fxopt.kernels.sparse24 import GROUP, is_sparse24
from fxopt.nodes import origins
from fxopt.operators import Linear, as_linear, reads_as_linear, refuse_shared_weight
from fxopt.passes.linear_layers.linear_rule import LinearRule, rows_of
from fxopt.passes.linear_layers.selection import (
    Selections,
    refuse_by_path,
    refuse_weight,
)
from fxopt.passes.linear_layers.weight_inputs import watch_inputs, watch_moments
from fxopt.passes.quantization.quantize_linear import WeightKey, weight_key
from fxopt.program import Origin, Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Pass, Plan, Stage, plan_rules, rewrite
from fxopt.rewriting.option_annotations import DeviceOption
from fxopt.weights.sparsegpt import ChannelPower, Importance, mask24, masked24, prune24

aten = torch.ops.aten

SPARSE24 = Origin("sparsify24", "sparse24")
"""A weight that was masked."""

Learnt = Mapping[WeightKey, Tensor]
"""By weight: Wanda's norms of the channels [K], or SparseGPT's pruned weights [N, K]."""


class MaskLinear(LinearRule):
    """x @ Wᵀ + b ~ x @ (W * m)ᵀ + b"""

    def __init__(self, options: Sparsify24, program: Program, learnt: Learnt | None = None) -> None:
        self.options, self.program, self.learnt = options, program, learnt or {}
        self.reasons: dict[WeightKey, str | None] = {}
        self.made: set[fx.Node] = set()

    def match(self, node: fx.Node) -> Match | None:
        match = super().match(node)
        # What this rule made is a linear too, and nothing was refused there.
        return match if match and match["linear"].weight not in self.made else None

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        unfit = refuse_by_path(linear, self.options.include, self.options.exclude)
        unfit = unfit or refuse_weight(linear)
        if unfit is not None:
            return unfit
        if SPARSE24 in origins(linear.weight):
            return "its weight is 2:4 sparse already"
        if linear.in_features % GROUP:
            return f"its K = {linear.in_features} is no multiple of {GROUP}"
        answer = self.options.answer(linear.weight.meta["val"].device)
        if not answer and not self.options.force:
            return f"{answer.reason}: zeros save nothing there; force=True masks all the same"
        return self._refuse_tied(linear) or self._reason_in_values(linear)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        make = self._masked_parameter if self.program.mode == "train" else self._masked
        weight = edit.once((self, weight_key(linear)), lambda: make(linear, edit))
        self.made.add(weight)
        return edit.call(aten.linear.default, linear.x, weight, linear.bias)

    def _refuse_tied(self, linear: Linear) -> str | None:
        """In train mode the weight stays one parameter, whoever reads it."""
        if self.options.tied or self.program.mode == "train":
            return None
        return refuse_shared_weight(linear, reads_as_linear)

    def _reason_in_values(self, linear: Linear) -> str | None:
        key = weight_key(linear)
        if key not in self.reasons:
            rows = rows_of(self.program, linear)
            reason = None
            if not bool(rows.isfinite().all()):
                reason = "its weight holds NaN or infinity"
            elif is_sparse24(rows):
                reason = "its weight is 2:4 sparse already"
            self.reasons[key] = reason
        return self.reasons[key]

    def _masked(self, linear: Linear, edit: Edit) -> fx.Node:
        """W * m, computed when it is needed: until then the model's own W is the only copy."""
        name, pruned = f"{linear.weight.target}_sparse24", self._pruned(linear)
        trains = edit.state(linear.weight).requires_grad
        masked: Tensor | Recipe
        if pruned is None:
            masked = self._recipe(linear, edit, masked24, linear.dtype)
        else:
            masked = torch.nn.Parameter(pruned) if trains else pruned
        return edit.constant(name, masked, origin=SPARSE24, of=linear.weight)

    def _masked_parameter(self, linear: Linear, edit: Edit) -> fx.Node:
        """W * m with a constant m: W stays the parameter that trains, its zeros stay zeros."""
        pruned = self._pruned(linear)
        mask = self._recipe(linear, edit, mask24, torch.bool) if pruned is None else pruned != 0
        weight = linear.weight
        if linear.transposed:
            weight = edit.call(aten.t.default, weight)
        constant = edit.constant(f"{linear.weight.target}_mask24", mask)
        return edit.call(aten.mul.Tensor, weight, constant)

    def _pruned(self, linear: Linear) -> Tensor | None:
        """SparseGPT's weight [N, K], where there is one."""
        return self.learnt.get(weight_key(linear)) if self.options.feeds_back else None

    def _recipe(self, linear: Linear, edit: Edit, make: Any, dtype: torch.dtype) -> Recipe:
        rows = linear.weight_nk(edit.state(linear.weight))
        norm = None if self.options.feeds_back else self.learnt.get(weight_key(linear))
        sources = (rows,) if norm is None else (rows, norm)
        grad = rows.requires_grad and dtype.is_floating_point
        return Recipe(make, sources, torch.Size(rows.shape), dtype, rows.device, grad)


@dataclass(frozen=True)
class Sparse24Plan(Plan):
    """A plan with what calibration told of the weights."""

    learnt: Learnt = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class Sparsify24(Pass[Sparse24Plan]):
    """Linear layers on weights of which every four neighbours along K hold at most two.

    `importance` says which two stay: the largest (`"magnitude"`), the largest times the norm of
    their inputs on `transform(calibration=)` (`"wanda"`), or those whose loss the others can make
    up for best, and the others do (`"sparsegpt"`: as GPTQ, all layers on the inputs that the
    untouched model gives them).

    Refused on a device without sparse tensor cores, with the reason, unless `force=True`: then the
    weights are masked, and nothing runs faster. `device` is a description such as "cuda:8.0", in
    place of the device that the model is on. torch multiplies 2:4 in half precision alone: put
    `HalfLinear` after it for a float32 model. `include` and `exclude` are globs over module paths
    (`"encoder.layer.*.output.dense"`) or functions of the path. A weight that an embedding reads
    too is left alone unless `tied=True`. In train mode the weight stays the parameter, times a
    constant mask (of `"sparsegpt"` the mask alone), and the claim is judged on gradients too.

    Claim: a signal-to-noise ratio of the model's outputs, 1 dB unless `claim` gives another. Half
    of the weights are gone: a trained sentence encoder (6 layers) keeps 0.3 dB by magnitude, which
    breaks the claim, 2 by Wanda and 5 by SparseGPT; `exclude` and training get more of it back.
    Raises `PassError` for options that don't exist.
    """

    importance: Importance = "magnitude"
    include: Selections = ("*",)
    exclude: Selections = ()
    tied: bool = False
    force: bool = False
    device: DeviceOption = None
    claim: Claim = Sqnr(1.0)  # zeros in place of the outputs, or twice the outputs, have 0 dB
    name: ClassVar[str] = "sparsify24"
    stage: ClassVar[Stage] = Stage.NUMERICS

    @property
    def feeds_back(self) -> bool:
        """Whether what stays makes up for what leaves."""
        return self.importance == "sparsegpt"

    def answer(self, device: torch.device) -> Answer:
        """Whether zeros save anything on `device`, or on the one that the option names."""
        described = Device.parse(self.device) if self.device else Device.describe(device)
        return described.sparse24()

    def plan(self, program: Program) -> Sparse24Plan:
        """The linears that will be masked, and why the others will not."""
        base = plan_rules(program, (MaskLinear(self, program),), repr(self))
        chosen = {site.node for site in base.sites}
        found = (as_linear(node) for node in program.graph.nodes if node.name in chosen)
        linears = [linear for linear in found if linear is not None]
        warnings = dict.fromkeys(_slow(self, linears))
        learnt = self._learn(program, linears, warnings) if linears else {}
        return Sparse24Plan(
            base.spec, base.sites, base.refusals, frozenset(), tuple(warnings), (), learnt
        )

    def apply(self, program: Program, plan: Sparse24Plan) -> Program:
        """Mask the plan's linears, sparing its excluded nodes."""
        return rewrite(program, (MaskLinear(self, program, plan.learnt),), plan.excluded)

    def _learn(
        self, program: Program, linears: Sequence[Linear], warnings: dict[str, None]
    ) -> dict[WeightKey, Tensor]:
        if self.importance == "magnitude":
            return {}
        learnt: dict[WeightKey, Tensor] = {}
        if self.importance == "wanda":
            for layers, power in watch_inputs(
                program, linears, ChannelPower, _power_bytes, warnings
            ):
                norm = power.power.sqrt()
                learnt.update({weight_key(linear): norm for linear in layers if power.rows})
            return learnt
        without = "importance='wanda'"
        for layers, moment in watch_moments(program, linears, warnings, "masked", without):
            for linear in layers if moment.rows else ():
                learnt[weight_key(linear)] = prune24(rows_of(program, linear), moment.matrix)
        return learnt


def _slow(options: Sparsify24, linears: Sequence[Linear]) -> list[str]:
    """Warns where what is masked will not run faster."""
    told = []
    for device in dict.fromkeys(linear.weight.meta["val"].device for linear in linears):
        answer = options.answer(device)
        if not answer:
            told.append(f"{answer.reason}: force=True masks the weights, and nothing runs faster")
    wide = [one for one in linears if one.dtype not in (torch.float16, torch.bfloat16)]
    if wide and not told:
        told.append(
            f"{len(wide)} of {len(linears)} masked weights are {wide[0].dtype}, which torch "
            "multiplies densely: put HalfLinear() after Sparsify24()"
        )
    return told


def _power_bytes(channels: int) -> int:
    return 8 * channels
