"""SelectKernels: quantize / dequantize regions become fused int8 operators.

    linear(dq(q, s), dq(Wq, Ws), b)  =  int8_linear(q, s, Wq, Ws, b)
    linear(x, dq(Wq, Ws), b)         =  int8_weight_only_linear(x, Wq, Ws, b)

Claim: close to the quantized reference: the int8 product is exact, the order of scaling isn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.claim import Claim, Close
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, constant, hole, op

aten, ops = torch.ops.aten, torch.ops.fxopt

_WEIGHT = op(
    ops.dequantize.default, constant("weight"), constant("weight_scale"), hole("weight_dtype")
)


class SelectInt8Linear(Rule):
    """linear(dq(q, s), dq(Wq, Ws), b) = int8_linear(q, s, Wq, Ws, b)"""

    exclusive = False
    pattern = op(
        aten.linear.default,
        op(ops.dequantize.default, hole("q"), hole("scale"), hole("dtype")),
        _WEIGHT,
        hole("bias"),
    )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("q", "scale", "weight", "weight_scale", "bias", "dtype")
        return edit.call(ops.int8_linear.default, *(match[name] for name in names))


class SelectInt8WeightOnlyLinear(Rule):
    """linear(x, dq(Wq, Ws), b) = int8_weight_only_linear(x, Wq, Ws, b)"""

    exclusive = False
    pattern = op(aten.linear.default, hole("x"), _WEIGHT, hole("bias"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        names = ("x", "weight", "weight_scale", "bias")
        return edit.call(ops.int8_weight_only_linear.default, *(match[name] for name in names))


@dataclass(frozen=True, repr=False)
class SelectKernels(RulePass):
    """Quantized regions become fused int8 operators. Claim: close to the quantized reference.

    `Lower` runs it by itself; give it on its own to serve a quantized model without a compiler.
    """

    name: ClassVar[str] = "select-kernels"
    stage: ClassVar[Stage] = Stage.KERNELS
    claim: Claim = Close()

    def rules(self, program: Program) -> Sequence[Rule]:
        """Activations first: the weight-only rule would match the same linear."""
        return (SelectInt8Linear(), SelectInt8WeightOnlyLinear())
