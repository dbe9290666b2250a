"""Observation: which values observers see, what is left uncomputed, and what is warned of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import CalibrationError
from fxopt.observation import MinMax, Observation, Rows, calibration_warnings, observe
from fxopt.program import Program
from tests.rewriting.functions import calls

aten = torch.ops.aten
X = torch.linspace(-1.0, 1.0, 8).view(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.log(self.first(x)).exp())


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def calibrated(model: nn.Module, batches: Any, progress: Any = None) -> Program:
    program = capture(model, (X,))
    return replace(program, calibration=Calibration(batches, program.signature, progress))


def test_observers_see_the_models_own_values_of_every_batch() -> None:
    model = Plain().eval()
    batches = [X, 2 * X[:1], X[[0, 1, 0]] - 3]
    program = calibrated(model, batches)
    (relu,) = calls(program, aten.relu.default)
    inputs, hidden, same = Rows(), Rows(), Rows()
    seen = observe(program, {program.placeholders[0]: [inputs], relu: [hidden, same]})
    assert torch.equal(inputs.rows, torch.cat(batches))
    with torch.no_grad():
        expected = torch.relu(model.first(torch.cat(batches)))
    torch.testing.assert_close(hidden.rows, expected)
    assert torch.equal(hidden.rows, same.rows)
    assert seen == Observation(3, 6, (2, 4), all_equal=False, from_example=False)


def test_a_training_program_is_observed_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 5))
    for number in (1.0, 2.0):
        model(number * X)  # running statistics of their own
    program = capture(model, (X,), mode="train")
    program = replace(program, calibration=Calibration([X, 2 * X], program.signature))
    last = calls(program, aten.linear.default)[-1]
    dropped = last.args[0]
    assert isinstance(dropped, fx.Node)
    (native_dropout,) = dropped.all_input_nodes
    (normalised,) = native_dropout.all_input_nodes
    undropped, before_dropout = Rows(), Rows()
    state = torch.get_rng_state()
    before = model[1].running_mean.clone()
    observe(program, {dropped: [undropped], normalised: [before_dropout]})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, before)
    with torch.no_grad():
        expected = model.eval()[:3](torch.cat([X, 2 * X]))
    torch.testing.assert_close(undropped.rows, expected)
    assert torch.equal(before_dropout.rows, undropped.rows)


def test_without_calibration_the_example_stands_in() -> None:
    program = capture(Plain().eval(), (X,))
    inputs = Rows()
    seen = observe(program, {program.placeholders[0]: [inputs]})
    assert torch.equal(inputs.rows, X)
    assert seen == Observation(1, 2, (2, 4), all_equal=False, from_example=True)


def test_what_no_watched_value_needs_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = calibrated(Plain().eval(), [X])
    (relu,) = calls(program, aten.relu.default)
    text = str(program.graph)
    computed: list[Any] = []

    def spy(cut: Program, *rest: Any) -> Any:
        computed.extend(node.target for node in calls(cut))
        assert {name.partition(".")[0] for name in cut.state} == {"first"}

    monkeypatch.setattr("fxopt.observation.observation.evaluate", spy)
    observe(program, {relu: []})
    assert computed == [aten.linear.default, aten.relu.default]
    assert str(program.graph) == text


def test_buffers_that_a_call_writes_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    program = capture(model, (X,), "train")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    observed = MinMax()
    observe(program, {calls(program, aten.linear.default)[0]: [observed]})
    assert observed.count == 4
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_a_nan_names_batch_node_and_what_to_do() -> None:
    program = calibrated(Net().eval(), [torch.full((2, 4), -0.0), X * 50])
    program = replace(program)
    (log,) = calls(program, aten.log.default)
    observed = MinMax()
    with pytest.raises(CalibrationError) as caught:
        observe(program, {program.placeholders[0]: [], log: [observed]})
    text = str(caught.value)
    assert text.startswith("calibration batch ")
    assert "NaN of 6 values at log" in text
    assert "test_observation.py" in text
    assert text.endswith("Take the batch out, or look for what makes the model itself give NaN.")


def test_progress_is_told_at_powers_of_two_with_the_length_where_known() -> None:
    lines: list[str] = []
    observe(calibrated(Plain().eval(), [X] * 9, lines.append), {})
    assert lines == [f"calibrating: batch {number} of 9" for number in (1, 2, 4, 8)]
    lines.clear()
    observe(calibrated(Plain().eval(), (X for _ in range(3))), {}, lines.append)
    assert lines == ["calibrating: batch 1", "calibrating: batch 2"]


def test_progress_is_told_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.observation.observation._SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    observe(calibrated(Plain().eval(), [X] * 6, lines.append), {})
    assert len(lines) == 6


def watched(batches: Any) -> tuple[Observation, Mapping[str, list[Any]]]:
    program = calibrated(Plain().eval(), batches)
    (relu,) = calls(program, aten.relu.default)
    inputs, hidden = MinMax(), MinMax()
    seen = observe(program, {program.placeholders[0]: [inputs], relu: [hidden]})
    return seen, {"first": [inputs], "head": [hidden]}


def test_too_few_samples_name_the_layers() -> None:
    assert calibration_warnings(*watched([X, X - 1, X + 1])) == (
        "calibrated on 6 samples in 3 batches only (the first 2 x 4); the ranges of first, head "
        "come from it: give calibration= at least 32 samples of real inputs",
    )
    seen = Observation(1, 1, (1, 4), all_equal=False, from_example=False)
    (line,) = calibration_warnings(seen, {f"layer.{n}": [] for n in range(9)})
    assert line.startswith("calibrated on 1 sample in 1 batch only (the first 1 x 4); the ranges")
    assert "of layer.0, layer.1, layer.2, layer.3 and 5 more come from it" in line
    assert calibration_warnings(*watched([X + n / 16 for n in range(16)])) == ()


def test_the_example_alone_is_too_few_and_says_so() -> None:
    seen = Observation(1, 2, (2, 4), all_equal=False, from_example=True)
    assert calibration_warnings(seen, {"first": []}) == (
        "calibrated on the example alone (2 x 4), since calibration= was left out; the ranges of "
        "first come from it: give calibration= at least 32 samples of real inputs",
    )


def test_batches_that_are_all_the_same_name_the_layers() -> None:
    assert calibration_warnings(*watched([X.clone() for _ in range(40)])) == (
        "all 40 calibration batches (2 x 4) are the same, and the ranges of first, head come from "
        "it: give calibration= real, varied inputs",
    )


def test_one_constant_value_and_none_at_all_name_the_layers() -> None:
    lines = calibration_warnings(*watched([torch.full((32, 4), n) for n in (-3e9, -4e9)]))
    assert "one constant value" not in " ".join(lines)
    seen, layers = watched([torch.full((32, 4), 2.0), torch.full((1, 4), 2.0)])
    assert calibration_warnings(seen, layers) == (
        "one constant value alone reached first during calibration, so the range learnt there says "
        "nothing about other inputs",
    )
    seen = replace(seen, all_equal=False)
    assert calibration_warnings(seen, {"expert.3": [MinMax()]}) == (
        "no value at all reached expert.3 during calibration",
    )


def test_no_observer_of_its_own_needs_to_say_what_it_saw() -> None:
    class Count:
        seen = 0

        def update(self, value: Tensor) -> None:
            self.seen += value.numel()

    program = calibrated(Plain().eval(), [X] * 2)
    count = Count()
    seen = observe(program, {program.placeholders[0]: [count]})
    assert count.seen == 16
    assert len(calibration_warnings(seen, {"first": [count]})) == 1
