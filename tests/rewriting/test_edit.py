"""What rules make once for several roots: shared while it is there, and never a stale node."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxopt import Edit, Match, Rule, wellformed
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.rewriting import hole, op, rewrite

aten = torch.ops.aten


class Chain(nn.Module):
    """abs, `length` times in a row."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.length):
            x = x.abs()
        return x


def edited(length: int) -> tuple[Edit, list[fx.Node]]:
    edit = Edit(capture(Chain(length), (torch.ones(2),)))
    return edit, [node for node in edit.graph.nodes if node.op == "call_function"]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=12))
def test_what_is_made_once_is_always_at_hand(steps: list[tuple[int, bool, bool]]) -> None:
    """Whatever the order of the roots, and whatever is erased between them."""
    edit, roots = edited(4)
    x = next(iter(edit.graph.nodes))
    made: tuple[fx.Node, ...] | None = None
    for place, erases, erases_first in steps:
        edit.start(roots[place])

        def make() -> tuple[fx.Node, ...]:
            return edit.call(aten.neg.default, x), edit.call(aten.exp.default, x)

        known, made = made, edit.once("pair", make)
        fits = known is not None and all(n in edit.graph.nodes and n < roots[place] for n in known)
        assert (made is known) == fits
        assert all(node in edit.graph.nodes and node < roots[place] for node in made)
        if erases:
            edit.graph.erase_node(made[0 if erases_first else 1])
    edit.graph.lint()


def test_keys_are_apart() -> None:
    edit, (root,) = edited(1)
    edit.start(root)
    x = root.args[0]
    made = [edit.once((key, x), lambda: edit.call(aten.neg.default, x)) for key in "aba"]
    assert made[0] is made[2]
    assert made[0] is not made[1]


class Relu(Rule):
    """relu(x) = neg(exp(x)), exp made once"""

    pattern = op(aten.relu.default, hole("x"))
    made: ClassVar[list[fx.Node]] = []

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        def make() -> fx.Node:
            self.made.append(edit.call(aten.exp.default, match["x"]))
            return self.made[-1]

        return edit.call(aten.neg.default, edit.once((self, match["x"]), make))


class DropExp(Rule):
    """neg(exp(x)) = sin(x)"""

    pattern = op(aten.neg.default, op(aten.exp.default, hole("x")))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.sin.default, match["x"])


class Through(Rule):
    """tanh(x) = cos(x), and cos(x) = relu(x)"""

    pattern = op((aten.tanh.default, aten.cos.default), hole("x"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        after = aten.cos if match.root.target is aten.tanh.default else aten.relu
        return edit.call(after.default, match["x"])


@pytest.mark.parametrize("drops", [True, False])
def test_a_node_that_another_rule_erased_is_made_anew(drops: bool) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.relu(), x.tanh()

    program = capture(Both(), (torch.ones(2),))
    Relu.made.clear()
    result = rewrite(program, [Relu(), Through(), *([DropExp()] if drops else [])])
    wellformed.check(result)
    assert len(Relu.made) == (2 if drops else 1), "with it, the first exp is erased between"
    x = torch.tensor([0.5, 2.0])
    expected = x.sin() if drops else -x.exp()
    for output in evaluate(result, (x,)):
        torch.testing.assert_close(output, expected)
