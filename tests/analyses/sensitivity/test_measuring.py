"""Sensitivity: equal to evaluating the rewritten programs, and the planted layer is found."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxopt import Int8Linear, PassError, Sqnr
from fxopt.analyses.sensitivity.measuring import Candidate, Effect, Sensitivity, measure_sensitivity
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.kernels import quantize_weight
from fxopt.nodes import module_path
from fxopt.operators import as_linear
from fxopt.program import Program

ops = torch.ops.fxopt


class Chain(nn.Module):
    """Residual layers; one of them sees outliers in its input, which cost its int8 rows most."""

    def __init__(self, depth: int, width: int, outliers: int | None, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outliers = outliers
        if outliers is not None:
            with torch.no_grad():
                self.layers[outliers].weight[:, 0] /= 300

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            y = torch.tanh(x)
            if index == self.outliers:
                y = torch.cat([y[..., :1] * 300, y[..., 1:]], -1)
            x = x + layer(y)
        return x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.query(x), self.key(x)
        return self.out(q * k), (q > 0).long()


def int8(node: fx.Node) -> Any:
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = ops.dequantize(*ops.quantize_per_token(x), x.dtype)
        weight = ops.dequantize(*quantize_weight(weight), weight.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    return compute


def candidates_of(program: Program) -> list[Candidate]:
    """All linears that share an input are one candidate."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        linear = as_linear(node)
        if linear is not None:
            groups.setdefault(linear.x, []).append(node)
    return [
        Candidate("|".join(map(module_path, nodes)), {node: int8(node) for node in nodes})
        for nodes in groups.values()
    ]


def rewritten_db(program: Program, names: Sequence[str], batches: Sequence[Any]) -> float:
    """The oracle: the program that Int8Linear makes of these layers, evaluated."""
    paths = tuple(path for name in names for path in name.split("|"))
    pass_ = Int8Linear(include=paths, where="always", range=8)
    after = pass_.apply(program, pass_.plan(program))
    return min(
        Sqnr(1.0).measure(old, new).value
        for batch in batches
        for old, new in zip(evaluate(program, batch), evaluate(after, batch), strict=True)
    )


def check_against_oracle(program: Program, found: Sensitivity, batches: Sequence[Any]) -> None:
    for index, row in enumerate(found.rows):
        assert row.alone_db == pytest.approx(rewritten_db(program, [row.name], batches))
        if row.cumulative_db is not None:
            together = [other.name for other in found.rows[index:]]
            assert row.cumulative_db == pytest.approx(rewritten_db(program, together, batches))


@settings(max_examples=10)
@given(
    depth=st.integers(1, 5),
    width=st.sampled_from([4, 8, 17]),
    seed=st.integers(0, 99),
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_equal_to_the_rewritten_programs(
    depth: int, width: int, seed: int, rows: list[int]
) -> None:
    model = Chain(depth, width, None, seed).eval()
    batches = [(torch.randn(count, 3, width),) for count in rows]
    program = capture(model, (torch.randn(4, 3, width),))
    found = measure_sensitivity(program, candidates_of(program), batches)
    assert len(found.rows) == depth
    assert found.runs == len(rows) * 2 * depth
    assert [row.alone_db for row in found.rows] == sorted(row.alone_db for row in found.rows)
    assert sum(row.share for row in found.rows) == pytest.approx(1.0)
    check_against_oracle(program, found, batches)


def test_linears_on_one_input_go_together_and_integer_outputs_count() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 8),)]
    program = capture(Shared().eval(), batches[0])
    found = measure_sensitivity(program, candidates_of(program), batches)
    assert {row.name for row in found.rows} == {"query|key", "out"}
    check_against_oracle(program, found, batches)


@pytest.mark.parametrize("planted", [0, 2, 5])
def test_the_layer_with_outliers_is_the_costliest(planted: int) -> None:
    model = Chain(6, 32, planted, 0).eval()
    batches = [(torch.randn(8, 32),), (torch.randn(3, 32),)]
    program = capture(model, batches[0])
    found = measure_sensitivity(program, candidates_of(program), batches)
    worst = found.rows[0]
    assert worst.name == f"layers.{planted}"
    assert worst.alone_db < found.rows[1].alone_db - 6.0
    budget = Sqnr(found.rows[1].cumulative_db or 0.0)
    assert found.within(budget) == {worst.name}
    assert rewritten_db(program, [row.name for row in found.rows[1:]], batches) >= budget.db - 1e-6


@pytest.mark.parametrize("budget", [10.0, 20.0, 48.0, 50.0, 53.0, 80.0])
def test_a_bisected_budget_keeps_what_the_whole_walk_keeps(budget: float) -> None:
    model = Chain(7, 16, 3, 1).eval()
    batches = [(torch.randn(8, 16),)]
    program = capture(model, batches[0])
    candidates = candidates_of(program)
    whole = measure_sensitivity(program, candidates, batches)
    levels = [row.cumulative_db or 0.0 for row in whole.rows]
    assert all(one < other for one, other in pairwise(levels)), "the test wants a plain case"
    found = measure_sensitivity(program, candidates, batches, budget=Sqnr(budget))
    assert found.within(Sqnr(budget)) == whole.within(Sqnr(budget))
    assert found.runs <= 1 + 7 + 4 < whole.runs
    left = found.cumulative_db(found.within(Sqnr(budget)))
    assert left is not None
    assert left >= budget


def test_within_takes_the_costliest_and_no_more_than_asked_for() -> None:
    levels = (10.0, 20.0, None, 40.0)
    rows = tuple(Effect(name, 1.0, db, 0.25) for name, db in zip("abcd", levels, strict=True))
    found = Sensitivity(rows)
    assert found.within(Sqnr(5.0)) == set()
    assert found.within(Sqnr(20.0)) == {"a"}
    assert found.within(Sqnr(30.0)) == {"a", "b", "c"}, "an unmeasured place can't be relied on"
    assert found.within(Sqnr(41.0)) == {"a", "b", "c", "d"}
    assert found.within(max_layers=2) == {"a", "b"}
    assert found.within(max_layers=9) == {"a", "b", "c", "d"}
    assert found.within(Sqnr(30.0), max_layers=1) == {"a"}
    assert found.within(Sqnr(20.0), max_layers=3) == {"a"}
    assert found.cumulative_db({"a"}) == 20.0
    assert found.cumulative_db(["b", "a"]) is None
    assert found.cumulative_db({"d"}) is None
    assert found.cumulative_db("abcd") == math.inf


def test_a_layer_that_gives_nan_has_all_the_noise_and_is_kept() -> None:
    model = Chain(3, 8, None, 0).eval()
    batches = [(torch.randn(4, 8),)]
    program = capture(model, batches[0])
    candidates = candidates_of(program)
    (node,) = candidates[1].values
    candidates[1] = Candidate("broken", {node: lambda x, w, b: x * math.nan})
    found = measure_sensitivity(program, candidates, batches)
    assert found.rows[0] == Effect("broken", -math.inf, -math.inf, 1.0, candidates[1].paths)
    assert found.rows[0].paths == (module_path(node),)
    assert found.within(Sqnr(10.0)) == {"broken"}


def test_rewrites_that_change_nothing_cost_nothing() -> None:
    model = Chain(2, 8, None, 0).eval()
    batches = [(torch.randn(4, 8),)]
    program = capture(model, batches[0])
    same = torch.nn.functional.linear
    candidates = [Candidate(c.name, dict.fromkeys(c.values, same)) for c in candidates_of(program)]
    found = measure_sensitivity(program, candidates, batches)
    assert {(row.alone_db, row.cumulative_db, row.share) for row in found.rows} == {
        (math.inf, math.inf, 0.0)
    }
    assert found.within(Sqnr(200.0)) == set()
    assert "exact" in str(found)


def test_the_callers_generator_and_model_stay_as_they_were() -> None:
    model = Chain(2, 8, None, 0).train()
    program = capture(model, (torch.randn(4, 8),), mode="train")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    said: list[str] = []
    measure_sensitivity(program, candidates_of(program), [program.example], progress=said.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == "sensitivity: 2 candidates alone, batch 1"
    assert said[1] == "sensitivity: 2 of 2 candidates together"


def test_the_table() -> None:
    rows = (
        Effect("encoder.layer.0.output", 12.0, 10.0, 0.8),
        Effect("encoder.layer.1.output", 18.0, None, 0.2),
        Effect("head", math.inf, math.inf, 0.0),
    )
    assert str(Sensitivity(rows, 6)).splitlines() == [
        "sensitivity of the outputs to 3 candidates, signal over noise, in 6 runs",
        "  rewritten                 alone  with those below   noise",
        "  encoder.layer.0.output  12.0 dB           10.0 dB  80.0 %  ████████████████████",
        "  encoder.layer.1.output  18.0 dB                 -  20.0 %  █████",
        "  head                      exact             exact   0.0 %",
    ]
    assert Sensitivity(rows, 6).lines(1)[-1] == "  and 2 more, 20.0 % of the noise in all"
    assert str(Sensitivity(())) == "sensitivity: no candidates"


@pytest.mark.parametrize("budget", [None, Sqnr(15.0)])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_the_plot_is_one_drawing_with_every_name_escaped(count: int, budget: Sqnr | None) -> None:
    rows = tuple(
        Effect(f"<layer> & {index}", 10.0 + index, None if index == 1 else 9.0 + index, 1 / 60)
        for index in range(count)
    )
    svg = Sensitivity(rows).svg(budget)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert ("budget 15 dB" in texts) == (budget is not None)
    names = [text for text in texts if text and text.startswith("<layer>")]
    assert len(names) == min(count, 40)
    assert ("the 40 costliest" in svg) == (count > 40)
    assert "script" not in svg
    assert "href" not in svg


def test_misuse_is_explained() -> None:
    model = Chain(2, 8, None, 0).eval()
    program = capture(model, (torch.randn(4, 8),))
    one, other = candidates_of(program)
    batches = [program.example]
    with pytest.raises(PassError, match=r"2 candidates are named 'layers\.0'"):
        measure_sensitivity(program, [one, Candidate(one.name, other.values)], batches)
    with pytest.raises(PassError, match=r"layers\.0 \(linear\) belongs to the candidates .* and b"):
        measure_sensitivity(program, [one, Candidate("b", one.values)], batches)
    with pytest.raises(PassError, match="no batch of inputs"):
        measure_sensitivity(program, [one], [])
    with pytest.raises(PassError, match="neither a budget nor a number of layers"):
        Sensitivity(()).within()
    with pytest.raises(PassError, match="max_layers=-1"):
        Sensitivity(()).within(max_layers=-1)
    assert measure_sensitivity(program, [], batches).rows == ()
