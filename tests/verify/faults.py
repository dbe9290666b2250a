"""Faults to plant: a rule that rewrites every linear, wrongly at the modules it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxopt.claim import Claim, Close
from fxopt.nodes import module_path
from fxopt.rewriting import Edit, Match, Rule, hole, op

aten = torch.ops.aten


def _scaled(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.mul.Scalar, _right(edit, x, w, b), 1.5)


def _no_bias(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.matmul.default, x, edit.call(aten.t.default, w))


def _swapped(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.flip.default, _right(edit, x, w, b), [-1])


def _nan(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.mul.Scalar, _right(edit, x, w, b), float("nan"))


def _infinite(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.div.Scalar, _right(edit, x, w, b), 0.0)


def _zeros(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    return edit.call(aten.mul.Scalar, _right(edit, x, w, b), 0.0)


def _right(edit: Edit, x: Any, w: Any, b: Any) -> fx.Node:
    product = edit.call(aten.matmul.default, x, edit.call(aten.t.default, w))
    return edit.call(aten.add.Tensor, product, b)


FAULTS: dict[str, Callable[[Edit, Any, Any, Any], fx.Node]] = {
    "scaled output": _scaled,
    "dropped bias": _no_bias,
    "swapped channels": _swapped,
    "NaN": _nan,
    "infinity": _infinite,
    "zeros": _zeros,
}


class SplitLinear(Rule):
    """linear(x, W, b) = x @ Wᵀ + b, and something else at the guilty modules"""

    claim: ClassVar[Claim] = Close()  # type: ignore[misc]
    pattern = op(aten.linear.default, hole("x"), hole("w"), hole("b"))

    def __init__(self, fault: str = "scaled output", guilty: tuple[str, ...] = ()) -> None:
        self.fault, self.guilty = FAULTS[fault], guilty

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        build = self.fault if module_path(match.root) in self.guilty else _right
        return build(edit, match["x"], match["w"], match["b"])


class Block(nn.Module):
    """x + linear(tanh(linear(norm(x))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def deep_model(blocks: int = 6, width: int = 8) -> nn.Sequential:
    """Residual blocks, two linears each, with seeded weights and visible biases."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(blocks)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()
