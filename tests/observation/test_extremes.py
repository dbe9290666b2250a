"""Extremes: against all values at once, over batches, and what they say about a dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.observation import Extremes, extremes, past_range
from fxopt.program import Program
from tests.models import Drawn, sequence_models


def named(program: Program, found: Extremes) -> dict[str, float]:
    assert list(found.largest) == [node for node in program.graph.nodes if node in found.largest]
    return {node.name: largest for node, largest in found.largest.items()}


@settings(max_examples=10)
@given(sequence_models(), st.booleans())
def test_each_node_and_constant_has_the_largest_of_all_batches(drawn: Drawn, many: bool) -> None:
    program = capture(drawn.model, drawn.example)
    calls = [drawn.example, *(drawn.others if many else ())]
    if many:
        program = replace(program, calibration=Calibration(calls, program.signature))
    found = extremes(program, program.graph.nodes)
    wanted: dict[str, float] = {}

    def look(node: torch.fx.Node, value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            wanted[node.name] = max(wanted.get(node.name, 0.0), value.abs().max().item())
        return value

    for call in calls:
        evaluate(program, program.signature.flatten((), call), look)
    assert named(program, found) == wanted


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -7e4]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.masked_fill(x < 0, -math.inf)
        return hidden * self.scale.abs() + x.argmax()


def test_infinities_and_integers_do_not_count() -> None:
    program = capture(Masked(), (torch.tensor([[1.0, 2.0], [-3.0, 1.5]]),))
    found = named(program, extremes(program, program.graph.nodes))
    assert found["scale"] == 7e4
    assert found["x"] == 3.0
    assert found["masked_fill"] == 2.0
    assert not {"lt", "argmax", "output"} & found.keys()


def test_what_leaves_a_range_is_told_with_its_number() -> None:
    program = capture(Masked(), (torch.tensor([[1.0, 2.0]]),))
    found = extremes(program, program.graph.nodes)
    past = {node.name: reason for node, reason in past_range(found, torch.float16).items()}
    assert past["scale"] == "its values reach 7e+04, past float16's largest, 65504"
    assert "masked_fill" not in past
    assert not past_range(found, torch.bfloat16)
    at_the_edge = Extremes(dict.fromkeys(found.largest, 65504.0))
    assert not past_range(at_the_edge, torch.float16)


def test_a_mask_of_float32s_least_number_leaves_bfloat16() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, torch.finfo(torch.float32).min)

    program = capture(Hidden(), (-torch.ones(2, 2),))
    reasons = list(past_range(extremes(program, program.graph.nodes), torch.bfloat16).values())
    assert reasons == ["its values reach 3.4e+38, past bfloat16's largest, 3.38953e+38"]


def test_few_samples_are_told() -> None:
    program = capture(nn.Linear(2, 2), (torch.randn(3, 2),))
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert extremes(program, weights).warnings == ()
    (warning,) = extremes(program, program.graph.nodes).warnings
    assert warning.startswith("calibrated on the example alone (3 x 2), since calibration= was")


def test_nan_does_not_count() -> None:
    program = capture(nn.ReLU(), (torch.randn(3, 2),))
    (x,) = program.placeholders
    batch = torch.tensor([[math.nan, 2.0], [-3.0, math.nan]])
    calibrated = replace(program, calibration=Calibration([batch], program.signature))
    assert extremes(calibrated, [x]).largest[x] == 3.0


def test_random_numbers_drawn_meanwhile_are_given_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    program = capture(model, (torch.randn(3, 2),), mode="train")
    state = torch.random.get_rng_state()
    extremes(program, program.graph.nodes)
    assert torch.equal(torch.random.get_rng_state(), state)
