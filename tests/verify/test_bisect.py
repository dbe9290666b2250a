"""The guilty node is named, however deep it sits and however many nodes were rewritten rightly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxopt
from fxopt.capture import capture
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import EquivalenceError
from fxopt.nodes import label
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Build, Conversion, Edit, Match, Rule, SingleRule, convert, rewrite
from fxopt.rewriting.pattern import Target
from fxopt.verify import Blame, Trial, Verdict, blame, judge_nodes, run_model, trials
from tests.rewriting.functions import calls
from tests.verify.faults import FAULTS, SplitLinear, deep_model

aten = torch.ops.aten
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@functools.cache
def deep() -> tuple[Program, Sequence[Trial]]:
    """The deep model, captured, and its trials."""
    model = deep_model()
    program = capture(model, (X,))
    return program, trials(program, run_model(model, program))[0]


def blamed(rule: SplitLinear) -> list[Blame]:
    program, found = deep()
    return blame(program, rewrite(program, [rule]), found[0])


@pytest.mark.parametrize("guilty", ["0.up", "3.down", "5.down"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_guilty_node_is_the_worst_and_far_from_the_innocent(fault: str, guilty: str) -> None:
    worst, *others = blamed(SplitLinear(fault, (guilty,)))
    program, _ = deep()
    (node,) = [n for n in calls(program) if n.meta["module_path"] == guilty]
    assert worst.before == node.name
    assert guilty in worst.text
    assert worst.db < 25.0
    assert all(other.db > 90.0 for other in others), "errors don't pile up behind the guilty node"
    assert len(others) <= 11


def test_every_guilty_node_is_found_in_one_run() -> None:
    guilty = ("1.up", "2.down", "4.up")
    blames = blamed(SplitLinear("swapped channels", guilty))
    assert all(path in "".join(b.text for b in blames[:3]) for path in guilty)
    assert all(b.db > 90.0 for b in blames[3:])


def test_a_right_rewrite_is_blamed_for_rounding_only() -> None:
    assert all(one.db > 90.0 for one in blamed(SplitLinear()))


def test_the_worst_comes_first() -> None:
    levels = [one.db for one in blamed(SplitLinear("dropped bias", ("0.up", "5.up")))]
    assert levels == sorted(levels)


def test_a_blame_shows_the_call_its_users_and_its_source_line() -> None:
    worst = blamed(SplitLinear("scaled output", ("3.up",)))[0]
    first, second, third = worst.text.splitlines()
    assert first.startswith("3.up (mul_")
    assert "= aten.mul.Scalar(" in first
    assert second.strip().startswith("used by tanh")
    assert "from " in third


def test_nodes_are_judged_each_on_the_inputs_it_had() -> None:
    program, found = deep()
    right = judge_nodes(Close(), program, rewrite(program, [SplitLinear()]), found)
    assert right is not None
    assert right.holds
    wrong = rewrite(program, [SplitLinear("dropped bias", ("2.up",))])
    verdict = judge_nodes(Close(), program, wrong, found)
    assert verdict is not None
    assert not verdict.holds
    assert "2.up" in verdict.where
    assert judge_nodes(Close(), program, program, found) is None


class Codes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 10).round().clamp(-128, 127).to(torch.int8)


class NextCodes(Rule):
    """to(x, int8) = to(x, int8) + offset, where `offset` holds a step for each entry"""

    def __init__(self, offset: Tensor) -> None:
        self.offset = offset
        self.done = False

    def targets(self) -> tuple[Target, ...]:
        return (aten.to.dtype,)

    def match(self, node: fx.Node) -> Match | None:
        return None if self.done else Match((node,), {})

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        self.done = True
        same = edit.call(match.root.target, *match.root.args)
        return edit.call(aten.add.Tensor, same, edit.constant("offset", self.offset))


def _judged_codes(claim: Claim, offset: Tensor) -> Verdict:
    x = torch.linspace(-9.0, 9.0, 400).view(20, 20)
    program = capture(Codes(), (x,))
    after = rewrite(program, [NextCodes(offset)])
    verdict = judge_nodes(claim, program, after, [Trial("the example", (x,), ())])
    assert verdict is not None
    return verdict


def _offset(count: int, steps: int) -> Tensor:
    offset = torch.zeros(20, 20, dtype=torch.int8)
    offset.reshape(-1)[:: 400 // count][:count] = steps
    return offset


@pytest.mark.parametrize("claim", [Close(), Sqnr(60.0)], ids=str)
@pytest.mark.parametrize("step", [1, -1])
def test_a_few_codes_may_be_the_next_ones(claim: Claim, step: int) -> None:
    verdict = _judged_codes(claim, _offset(4, step))
    assert verdict.holds
    assert verdict.measured.text == (
        "1.00% of the codes differ, by at most 1 step (allowed 1%, by one)"
    )


@pytest.mark.parametrize("claim", [Close(), Sqnr(1.0)], ids=str)
@pytest.mark.parametrize(
    ("count", "step", "text"),
    [
        (1, 2, "0.25% of the codes differ, by at most 2 steps (allowed 1%, by one)"),
        (5, 1, "1.25% of the codes differ, by at most 1 step (allowed 1%, by one)"),
        (400, -1, "100.00% of the codes differ, by at most 1 step (allowed 1%, by one)"),
    ],
)
def test_two_steps_or_many_ties_are_faults(claim: Claim, count: int, step: int, text: str) -> None:
    verdict = _judged_codes(claim, _offset(count, step))
    assert not verdict.holds
    assert verdict.measured.text == text


def test_equal_codes_hold_and_exact_allows_no_other() -> None:
    assert _judged_codes(Close(), _offset(1, 0)).holds
    assert not _judged_codes(Exact(), _offset(1, 1)).holds


def test_codes_that_wrap_around_are_far_apart() -> None:
    x = torch.tensor([[12.7, -12.8], [0.0, 0.1]])
    program = capture(Codes(), (x,))
    wrapped = torch.tensor([[1, 0], [0, 0]], dtype=torch.int8)
    after = rewrite(program, [NextCodes(wrapped)])
    verdict = judge_nodes(Close(), program, after, [Trial("the example", (x,), ())])
    assert verdict is not None
    assert "by at most 255 steps" in verdict.measured.text


class LooseSplit(SplitLinear):
    claim = Sqnr(60.0)


def violation(rule: Rule, model: nn.Module | None = None, **options: object) -> str:
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(model or deep_model(), [rule], example_inputs=(X,), **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_claim_tells_pass_claim_measurement_and_node(fault: str) -> None:
    lines = violation(SplitLinear(fault, ("3.up",))).splitlines()
    assert lines[0] == "SplitLinear() broke its claim"
    assert lines[1] == "  claimed: close"
    assert lines[2].startswith("  measured: ")
    assert " in output on " in lines[2]
    assert lines[3].startswith("  guilty node (")
    assert "dB on its own): 3.up (" in lines[3]
    if fault == "NaN":
        assert "entries are NaN" in lines[2]


def test_the_claim_of_a_rule_is_the_one_that_is_judged() -> None:
    assert "claimed: sqnr >= 60 dB" in violation(LooseSplit("dropped bias", ("3.up",)))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("guilty", [("2.down",), ("0.up", "3.up", "5.down")])
def test_revert_leaves_out_the_guilty_nodes_and_records_them(
    fault: str, guilty: tuple[str, ...]
) -> None:
    model = deep_model()
    opt = fxopt.transform(
        model, [SplitLinear(fault, guilty)], example_inputs=(X,), on_violation="revert"
    )
    record = opt.steps[-1].record
    labels = {
        label(n)
        for n in calls(capture(model, (X,)), aten.linear.default)
        if n.meta["module_path"] in guilty
    }
    reverted = {refusal.node for refusal in record.reverted}
    assert labels <= reverted
    assert len(reverted) <= 2 ** math.ceil(math.log2(len(guilty)))
    assert all(refusal.reason.startswith("reverted: ") for refusal in record.reverted)
    assert record.fired == {"SplitLinear": 12 - len(reverted)}
    assert record.holds
    torch.testing.assert_close(opt(X), model(X))
    kept = {n.meta["module_path"] for n in calls(opt.program, aten.linear.default)}
    assert set(guilty) <= kept


def test_revert_of_everything_keeps_the_predecessor() -> None:
    everything = tuple(f"{index}.{name}" for index in range(6) for name in ("up", "down"))
    opt = fxopt.transform(
        deep_model(), [SplitLinear("zeros", everything)], example_inputs=(X,), on_violation="revert"
    )
    record = opt.steps[-1].record
    assert record.firings == 0
    assert len(record.reverted) == 12
    assert torch.equal(opt(X), deep_model()(X))


def test_a_sum_over_the_budget_says_what_to_do() -> None:
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(deep_model(), "int8-linear", example_inputs=(X,), budget=Close(rtol=1e-6))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the whole list broke its claim"
    assert lines[1] == "  claimed: close(rtol=1e-06)"
    assert lines[-1] == (
        "  each pass kept its own claim, but their sum is over the budget: loosen budget=, or drop "
        "or tighten a pass"
    )


def test_a_single_rule_is_the_pass_that_is_blamed() -> None:
    assert repr(SingleRule(SplitLinear())) == "SplitLinear()"


class Narrowed(Conversion):
    """Weights cut along an axis, or multiplied, by name"""

    def __init__(self, cut: dict[str, int], times: dict[str, Tensor]) -> None:
        self.cut, self.times = cut, times

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        name = str(node.target)
        assert isinstance(tensor, Tensor)
        if name in self.cut:
            return tensor.index_select(self.cut[name], torch.tensor([0, 2]))
        return tensor * self.times[name] if name in self.times else tensor


def narrowed(fault: float = 1.0) -> tuple[Program, Program, Program]:
    """A program, it without half of its hidden channels, and the same thing masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Sigmoid())
    program = capture(model, (X,))
    cut = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    wrong = {"2.bias": torch.tensor(fault)} if fault != 1.0 else {}
    oracle = convert(program, Narrowed({}, {"2.weight": torch.tensor([1.0, 0, 1, 0])}), "Mask")
    return program, convert(program, Narrowed(cut, wrong), "Cut"), oracle


def test_what_a_cut_made_narrower_is_neither_compared_nor_fed() -> None:
    program, after, oracle = narrowed()
    trial = Trial("the example", (X,), ())
    assert all(one.db > 90.0 for one in blame(program, after, trial, oracle))
    # Without the oracle the reader is what differs, and nothing before or behind it.
    assert [one.before for one in blame(program, after, trial)] == ["linear_1"]


def test_a_wrong_cut_is_found_where_it_is_read() -> None:
    program, after, oracle = narrowed(fault=2.0)
    worst, *others = blame(program, after, Trial("the example", (X,), ()), oracle)
    assert worst.before == "linear_1"
    assert worst.db < 20.0
    assert all(other.db > 90.0 for other in others)


@pytest.mark.parametrize("fault", [1.0, 2.0])
def test_nodes_are_judged_against_an_oracle(fault: float) -> None:
    program, after, oracle = narrowed(fault)
    found = [Trial("the example", (X,), ()), Trial("another", (X[:1],), ())]
    verdict = judge_nodes(Close(), program, after, found, oracle)
    assert verdict is not None
    assert verdict.holds == (fault == 1.0)
    assert fault == 1.0 or verdict.where == "node 2 (linear_1)"


def test_an_oracle_may_name_its_nodes_otherwise() -> None:
    class Scaled(Conversion):
        """sigmoid(x) = exp(log_sigmoid(x)), and the reader masked on its input"""

        def call(
            self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
        ) -> fx.Node | None:
            if node.target is not aten.sigmoid.default:
                return None
            return build(aten.exp.default, build(aten.log_sigmoid.default, args[0]))

    program, after, masked = narrowed(fault=2.0)
    oracle = convert(masked, Scaled(), "Scaled")
    assert oracle.changes.replaced == {"sigmoid": "exp_default"}
    blames = blame(program, after, Trial("the example", (X,), ()), oracle)
    assert [one.before for one in blames if one.db < 90.0] == ["linear_1"]
    assert {one.before for one in blames} <= {"linear_1", "sigmoid", "linear", "tanh"}


class Gated(nn.Module):
    """Two layers, of one of which next to nothing reaches the output."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate = gate
        self.quiet, self.loud = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.quiet(x) + self.loud(x)


class Times(Rule):
    """linear(x, W, b) = linear(x, W, b) * a factor for the module it is in"""

    def __init__(self, factors: dict[str, float]) -> None:
        self.factors = factors
        self.made: set[fx.Node] = set()

    def targets(self) -> tuple[Target, ...]:
        return (aten.linear.default,)

    def match(self, node: fx.Node) -> Match | None:
        return None if node in self.made else Match((node,), {})

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        same = edit.call(match.root.target, *match.root.args)
        self.made.add(same)
        return edit.call(aten.mul.Scalar, same, self.factors[match.root.meta["module_path"]])


@settings(max_examples=10)
@given(st.floats(0.9, 0.99), st.integers(7, 12), st.sampled_from([0.0, -1.0, 3.0]))
def test_guilty_is_what_the_outputs_suffer_from(loud: float, power: int, quiet: float) -> None:
    model = Gated(10.0**-power).eval()
    rule = Times({"quiet": quiet, "loud": loud})
    program = capture(model, (X,))
    found, _ = trials(program, run_model(model, program))
    worst, other = blame(program, rewrite(program, [rule]), found[0])
    assert "loud" in worst.text
    assert other.db < worst.db, "the other errs more by itself"
    text = violation(rule, model)
    assert f"guilty node ({worst.outputs_db:.1f} dB at the outputs, {worst.db:.1f} dB on" in text
    opt = fxopt.transform(model, [rule], example_inputs=(X,), on_violation="revert")
    (reverted,) = opt.steps[-1].record.reverted
    assert reverted.node.startswith("loud")
