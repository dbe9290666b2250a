"""FuseConvBatchNorm: a batch norm in eval mode folds into the convolution or linear before it.

    gamma * (W * x + b - mean) / sqrt(var + eps) + beta  =  (s W) * x + (s (b - mean) + beta)
    with s = gamma / sqrt(var + eps), one factor per output channel

    conv(pad(x, p), padding q)  =  conv(x, padding p + q)      see `fold_padding`

Claim: close; the scale is applied to the weights, computed in float64, instead of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxopt.claim import Claim, Close
from fxopt.operators.convolutions import CONVOLUTIONS
from fxopt.passes.structure.fold_padding import FoldPadding
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, arguments, either, hole, op

aten = torch.ops.aten


class FoldBatchNorm(Rule):
    """batch_norm(conv(x, W, b)) = conv(x, s W, s (b - mean) + beta)"""

    moving: frozenset[str] = frozenset()

    def see(self, program: Program) -> None:
        """In train mode s W would take other steps than W and gamma do."""
        self.moving = program.learning | program.written

    pattern = op(
        aten.batch_norm.default,
        either(
            op(CONVOLUTIONS, hole("x"), hole("weight"), hole("bias"), name="layer", rest=True),
            op(aten.linear.default, hole("x"), hole("weight"), hole("bias"), name="layer"),
        ),
        hole("gamma"),
        hole("beta"),
        hole("mean"),
        hole("var"),
        rest=True,
    )

    def match(self, node: fx.Node) -> Match | None:
        """A batch norm: after a layer that it can fold into, or after anything else."""
        match = super().match(node)
        return match if match is not None else Match((node,), {"layer": None})

    def refuse(self, match: Match) -> str | None:
        if match["layer"] is None:
            return _unfolded(match.root)
        if match["training"]:
            return "the batch norm is in train mode: its statistics come from the batch"
        for name in ("weight", "bias", "gamma", "beta", "mean", "var"):
            value = match[name]
            if value is not None and (not isinstance(value, fx.Node) or value.op != "get_attr"):
                return f"its {name} is computed, not constant"
            if value is not None and str(value.target) in self.moving:
                return f"its {name} is trained, and would take other steps folded"
        if match["mean"] is None or match["var"] is None:
            return "the batch norm has no running statistics"
        layer = match["layer"]
        if layer.target is aten.linear.default and layer.meta["val"].ndim != 2:
            return "a batch norm over [N, C, L] normalises another axis than the linear's outputs"
        if len(match["weight"].users) > 1:
            return f"its weight {match['weight'].target} is shared with another layer"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        layer: fx.Node = match["layer"]
        weight, bias = _fold(match, edit)
        name = str(match["weight"].target).rpartition(".")[0]
        prefix = f"{name}." if name else ""
        given: dict[str, Any] = arguments(layer)
        given["weight"] = edit.constant(f"{prefix}weight_folded", weight)
        given["bias"] = edit.constant(f"{prefix}bias_folded", bias)
        return edit.call(layer.target, *given.values())


@dataclass(frozen=True, repr=False)
class FuseConvBatchNorm(RulePass):
    """A batch norm in eval mode folds into what it follows, zero padding into what follows it.

    A batch norm goes into the convolution or linear before it, padding into the convolution behind
    it. Claim: close.
    """

    name: ClassVar[str] = "fuse-conv-batch-norm"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    claim: Claim = Close()

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule each, for convolutions of any rank and linears."""
        return (FoldBatchNorm(), FoldPadding())


def _unfolded(norm: fx.Node) -> str:
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    kind = str(x.target).removeprefix("aten.").partition(".")[0]
    made = f"the input {x.name}" if x.op == "placeholder" else f"the result of {kind}"
    return f"it normalises {made}, which is no convolution and no linear"


def _fold(match: Match, edit: Edit) -> tuple[Tensor, Tensor]:
    weight = edit.tensor(match["weight"])
    mean, var = (edit.tensor(match[name]).double() for name in ("mean", "var"))

    def optional(name: str, default: float) -> Tensor:
        node = match[name]
        return torch.full_like(mean, default) if node is None else edit.tensor(node).double()

    scale = optional("gamma", 1.0) / torch.sqrt(var + match["eps"])
    bias = (optional("bias", 0.0) - mean) * scale + optional("beta", 0.0)
    folded = weight.double() * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    trainable = edit.state(match["weight"]).requires_grad
    return _as_parameter(folded.to(weight.dtype), trainable), _as_parameter(
        bias.to(weight.dtype), trainable
    )


def _as_parameter(tensor: Tensor, trainable: bool) -> Tensor:
    return torch.nn.Parameter(tensor) if trainable else tensor
