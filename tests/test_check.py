"""The helper of every pass test fails for each way in which a pass can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.claim import Claim, Exact
from fxopt.program import Changes, Program
from fxopt.rewriting import Match, Plan, Rule, RulePass, Stage, hole, op
from tests.architectures import randomize
from tests.check import check

aten = torch.ops.aten
_EXACT = Exact()
_INPUTS = {"x": torch.randn(2, 4)}


class TwoNegations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.neg(torch.neg(x)))


class DropNegations(Rule):
    """-(-x) = x"""

    pattern = op(aten.neg.default, op(aten.neg.default, hole("x")))

    def rewrite(self, match: Match, edit: Any) -> fx.Node:
        return match["x"]


class ScaleUp(Rule):
    """-(-x) = 2x, a planted fault"""

    pattern = DropNegations.pattern

    def rewrite(self, match: Match, edit: Any) -> fx.Node:
        return edit.call(aten.mul.Tensor, match["x"], 2.0)


@dataclass(frozen=True)
class Good(RulePass):
    name: ClassVar[str] = "good"
    stage: ClassVar[Stage] = Stage.ANY
    claim: Claim = _EXACT

    def rules(self, program: Program) -> tuple[Rule, ...]:
        return (DropNegations(),)


@dataclass(frozen=True)
class Wrong(Good):
    def rules(self, program: Program) -> tuple[Rule, ...]:
        return (ScaleUp(),)


@dataclass(frozen=True)
class Faulty(Good):
    """The good pass, then `then(input program, result)`."""

    then: Callable[[Program, Program], Program] = lambda before, result: result

    def apply(self, program: Program, plan: Plan) -> Program:
        return self.then(program, super().apply(program, plan))


def _edit_input(before: Program, result: Program) -> Program:
    for node in before.graph.nodes:
        if node.target is aten.neg.default:
            node.target = aten.abs.default
    return result


def _write_weight(before: Program, result: Program) -> Program:
    with torch.no_grad():
        result.state["linear.weight"].mul_(2.0)  # type: ignore[union-attr]
    return result


def _copy_weight(before: Program, result: Program) -> Program:
    weight = result.state["linear.weight"].clone()  # type: ignore[union-attr]
    return replace(result, state={**result.state, "linear.weight": weight})


def _count_again(before: Program, result: Program) -> Program:
    return replace(result, changes=Changes({"DropNegations": 1}))


def _drop_state(before: Program, result: Program) -> Program:
    return replace(result, state={"linear.bias": result.state["linear.bias"]})


def test_a_good_pass_passes() -> None:
    result = check(Good(), randomize(TwoNegations()), _INPUTS, {"DropNegations": 1})
    assert result.node_count() == 1
    check(Good(), randomize(TwoNegations()), _INPUTS, 1, others=[{"x": torch.randn(5, 4)}])


@pytest.mark.parametrize("fires", [0, 2, {"DropNegations": 2}, {}, {"Other": 1}], ids=str)
def test_firings_are_counted_exactly(fires: Any) -> None:
    with pytest.raises(AssertionError, match=r"fired \{'DropNegations': 1\}"):
        check(Good(), randomize(TwoNegations()), _INPUTS, fires)


def test_wrong_numbers_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"output 0 at \[\(2, 4\)\]: largest difference"):
        check(Wrong(), randomize(TwoNegations()), _INPUTS, 1)


@pytest.mark.parametrize(
    ("then", "text"),
    [
        (_edit_input, "input program's graph was edited|a second run"),
        (_write_weight, "linear.weight of the model was changed|output 0"),
        (_copy_weight, "untouched state was copied"),
        (_count_again, "a second run fired"),
    ],
)
def test_misbehaviour_is_caught(then: Any, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(Faulty(then=then), randomize(TwoNegations()), _INPUTS, 1)


def test_an_ill_formed_result_is_caught() -> None:
    with pytest.raises(Exception, match=r"linear\.weight"):
        check(Faulty(then=_drop_state), randomize(TwoNegations()), _INPUTS, 1)
