"""Pass and Plan: printed before anything is touched, narrowed, and pasted back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt.capture import capture
from fxopt.claim import Claim, Close, Exact
from fxopt.errors import PassError
from fxopt.program import Changes, Refusal
from fxopt.rewriting import Edit, Match, Plan, Rule, RulePass, SingleRule, Site, Stage, hole, op
from tests.rewriting.functions import calls, program_of

aten = torch.ops.aten
X = torch.linspace(-1.0, 1.0, 6).view(2, 3)


class SquareAsProduct(Rule):
    """x ** 2 = x * x"""

    pattern = op(aten.pow.Tensor_Scalar, hole("x"), 2)
    claim = Exact()

    def refuse(self, match: Match) -> str | None:
        return "x is an input" if match["x"].op == "placeholder" else None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.mul.Tensor, match["x"], match["x"])


@dataclass(frozen=True, repr=False)
class Squares(RulePass):
    """Squares as products."""

    factor: float = 1.0
    names: tuple[str, ...] = ()
    name: ClassVar[str] = "squares"
    claim: Claim = Close()

    def rules(self, program: Any) -> tuple[Rule, ...]:
        return (SquareAsProduct(),)


def squares() -> Any:
    return program_of(lambda x: (x**2, (x + 1) ** 2, (x - 1) ** 2), X)


def test_a_plan_names_its_sites_and_refusals_and_touches_nothing() -> None:
    program = squares()
    text = str(program.graph)
    first, second, third = calls(program, aten.pow.Tensor_Scalar)
    plan = Squares().plan(program)
    assert plan == Plan(
        "Squares()",
        (
            Site("SquareAsProduct", second.name, second.name),
            Site("SquareAsProduct", third.name, third.name),
        ),
        (Refusal("x is an input", first.name),),
    )
    assert str(program.graph) == text
    assert program.changes == Changes()


def test_a_plan_prints() -> None:
    assert str(Squares().plan(squares())) == (
        "plan of Squares()\n  SquareAsProduct: 2 sites\n  refused pow_1: x is an input"
    )
    assert str(Squares().plan(program_of(torch.sin, X))) == "plan of Squares()\n  nothing to do"


def test_a_plan_prints_its_decisions_and_warnings() -> None:
    plan = replace(
        Squares().plan(squares()),
        details=("layer  dB", "a      30"),
        warnings=("calibrated on 1 sample",),
    )
    assert str(plan) == (
        "plan of Squares()\n  SquareAsProduct: 2 sites\n  layer  dB\n  a      30\n"
        "  refused pow_1: x is an input\n  warning: calibrated on 1 sample"
    )


def test_a_plan_of_a_passs_own_kind_stays_one() -> None:
    @dataclass(frozen=True)
    class Scaled(Plan):
        scales: tuple[float, ...] = ()

    plan = Scaled("x", (Site("a", "n", "n"), Site("a", "m", "m")), scales=(0.5,), details=("d",))
    narrowed = plan.without({"n"})
    assert isinstance(narrowed, Scaled)
    assert (narrowed.scales, narrowed.details, len(narrowed.sites)) == ((0.5,), ("d",), 1)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan("x").sites = ()  # type: ignore[misc]


def test_sites_can_be_taken_out_of_a_plan() -> None:
    program = squares()
    plan = Squares().plan(program)
    spared = plan.sites[0].node
    narrowed = plan.without({spared})
    assert narrowed.sites == plan.sites[1:]
    assert narrowed.excluded == {spared}
    assert narrowed.without([plan.sites[1].node]).excluded == {site.node for site in plan.sites}
    assert len(plan.sites) == 2
    result = Squares().apply(program, narrowed)
    assert result.changes.fired == {"SquareAsProduct": 1}
    assert spared in {node.name for node in calls(result, aten.pow.Tensor_Scalar)}


def test_the_plan_of_a_rule_that_sees_everything_names_each_site_once() -> None:
    class Anywhere(SquareAsProduct):
        def targets(self) -> tuple[Any, ...]:
            return ()

    plan = SingleRule(Anywhere()).plan(squares())
    assert [site.rule for site in plan.sites] == ["Anywhere", "Anywhere"]


def test_a_site_names_the_module_it_is_in() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plan = fxopt.Int8Linear().plan(capture(model, (X,)))
    assert [site.label for site in plan.sites] == ["0 (linear)", "1 (linear_1)"]


def test_a_rule_in_a_list_is_a_pass_with_the_rules_claim() -> None:
    single = SingleRule(SquareAsProduct())
    assert single.claim == Exact()
    assert repr(single) == "SquareAsProduct()"
    assert single.stage is Stage.ANY


@pytest.mark.parametrize(
    ("pass_", "text", "spec"),
    [
        (Squares(), "Squares()", "squares"),
        (Squares(factor=2.0), "Squares(factor=2.0)", "squares{factor=2.0}"),
        (
            Squares(names=("a", "b"), claim=Close(rtol=1e-3)),
            "Squares(names=('a', 'b'), claim=Close(rtol=0.001, atol=1e-07))",
            "squares{names=a|b, claim=close(0.001|1e-07)}",
        ),
        (fxopt.Int8Linear(), "Int8Linear()", "int8-linear"),
        (
            fxopt.Int8Linear(mode="weight_only", tied=True),
            "Int8Linear(mode='weight_only', tied=True)",
            "int8-linear{mode=weight_only, tied=True}",
        ),
        (
            fxopt.Int8Linear(exclude=("head", "*.down")),
            "Int8Linear(exclude=('head', '*.down'))",
            "int8-linear{exclude=head|*.down}",
        ),
        (
            fxopt.Int8Linear(claim=fxopt.Sqnr(30.0)),
            "Int8Linear(claim=Sqnr(db=30.0))",
            "int8-linear{claim=sqnr(30.0)}",
        ),
    ],
)
def test_the_repr_names_only_what_was_changed(pass_: Any, text: str, spec: str) -> None:
    assert repr(pass_) == text
    assert eval(text, {**vars(fxopt), "Squares": Squares}) == pass_
    assert pass_.spec == spec


@pytest.mark.parametrize("mode", ["int4", "Dynamic"])
def test_options_are_validated_when_a_pass_is_built(mode: Any) -> None:
    with pytest.raises(PassError) as caught:
        fxopt.Int8Linear(mode=mode)
    choices = "'dynamic', 'static', 'weight_only'"
    hint = "; did you mean 'dynamic'?" if mode == "Dynamic" else ""
    assert str(caught.value) == f"Int8Linear(mode={mode!r}): give one of {choices}{hint}"


def test_changes_chain() -> None:
    first = Changes({"A": 1}, {"a": "b", "p": "q"}, (Refusal("why", "n"),))
    later = Changes(
        {"A": 2, "B": 1}, {"b": "c", "x": "y"}, (Refusal("why", "n"), Refusal("no", "m"))
    )
    both = first.then(later)
    assert both.fired == {"A": 3, "B": 1}
    assert both.replaced == {"a": "c", "b": "c", "p": "q", "x": "y"}
    assert both.refused == (Refusal("why", "n"), Refusal("no", "m"))
    assert Changes().then(first) == first
    assert first.then(Changes()) == first


def test_a_tied_weight_is_a_refusal_in_the_plan() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    plan = fxopt.Int8Linear().plan(capture(Pair(), (torch.arange(6).view(2, 3),)))
    assert plan.sites == ()
    (refusal,) = plan.refusals
    assert refusal.node == "head (linear)"
    assert refusal.reason == "its weight embedding.weight is tied: embedding reads it too"
