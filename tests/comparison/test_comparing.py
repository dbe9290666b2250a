"""compare: on models that run, that fail, and on what it can't take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.comparison import Comparison, compare, comparing
from fxopt.errors import MeasureError
from fxopt.measurement import Unmeasured
from fxopt.timing import ratio

QUICK: dict[str, Any] = {"repeats": 3, "seconds": 0.01, "energy": False, "count": False}
DATA = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def net(noise: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape)
    return model


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this\nsecond line")


def failing_later(x: Tensor) -> Tensor:
    if x is DATA[2]:
        raise ValueError("odd batch")
    return x[:, :3]


@pytest.fixture(scope="module")
def found() -> Comparison:
    models = {"plain": net(), "near": net(0.01), "far": net(0.3), "bad": failing}
    return compare({**models, "late": failing_later}, DATA, **QUICK)


def test_each_model_has_a_row_and_a_number(found: Comparison) -> None:
    assert [(row.number, row.name) for row in found.rows] == [
        (1, "plain"),
        (2, "near"),
        (3, "far"),
        (4, "late"),
    ]
    assert found.reference == "plain"
    assert found["near"].measurement.parameter_bytes == 4 * (6 * 32 + 32 + 32 * 3 + 3)
    assert found["near"].measurement.first_call_seconds > 0


def test_ratios_are_taken_round_by_round(found: Comparison) -> None:
    basis = found["plain"].measurement.latency
    for row in found.rows:
        assert row.ratio == ratio(row.measurement.latency, basis)
        assert row.ratio.pairs == 3
    assert (found["plain"].ratio.median, found["plain"].ratio.p95) == (1.0, 1.0)


def test_without_a_metric_sqnr_decides(found: Comparison) -> None:
    assert (found.quality.name, found.quality.unit) == ("SQNR", "dB")
    assert found.quality.values["plain"] == math.inf
    assert found.quality.values["near"] > found.quality.values["far"]
    assert "plain" in found.front("memory")
    assert "far" not in found.front("memory")
    assert found.front("energy") == ()


def test_what_fails_is_left_out_with_its_reason(found: Comparison) -> None:
    assert [(failure.name, failure.reason) for failure in found.failures] == [
        ("bad", "RuntimeError: no kernel for this"),
        ("late", "ValueError: odd batch"),
    ]
    assert found["late"].fidelity is None
    text = str(found)
    assert "not measured: anything of bad: RuntimeError: no kernel for this" in text
    assert "not measured: fidelity of late: ValueError: odd batch" in text
    assert "not measured: energy of all models: energy=False" in text
    assert isinstance(found["late"].measurement.energy, Unmeasured)
    with pytest.raises(KeyError, match="'bad'; compared were plain, near, far, late"):
        found["bad"]


def test_a_metric_decides_whichever_way_is_better() -> None:
    def error(model: Any, data: list[Tensor]) -> dict[str, float]:
        return {"error": sum(float((model(x) - net()(x)).abs().mean()) for x in data), "other": 1}

    models = {"far": net(0.3), "plain": net(), "near": net(0.01)}
    low = compare(models, DATA, metric=error, better="lower", reference="plain", **QUICK)
    assert low.quality.name == "error"
    assert low.quality.values["plain"] == 0.0
    assert low.front("memory") == ("plain",)
    high = compare(models, DATA, metric=error, reference="plain", **QUICK)
    assert high.front("memory") == ("far",)
    fidelity = low["far"].fidelity
    assert fidelity is not None
    assert set(fidelity.metrics) == {"error", "other"}


def test_labels_give_accuracy() -> None:
    labels = [net()(x).argmax(-1) for x in DATA]
    found = compare({"plain": net(), "far": net(0.3)}, DATA, labels=labels, **QUICK)
    assert (found.quality.name, found.quality.values["plain"]) == ("accuracy", 1.0)


def test_data_that_can_be_read_once_is_enough_without_a_metric() -> None:
    def once() -> Iterator[Tensor]:
        return iter(DATA)

    found = compare({"plain": net(), "near": net(0.01)}, once(), **QUICK)
    whole = compare({"plain": net(), "near": net(0.01)}, DATA, **QUICK)
    assert found["near"].fidelity == whole["near"].fidelity
    with pytest.raises(MeasureError, match="can be read once only"):
        compare({"plain": net()}, once(), metric=lambda model, data: 1.0, **QUICK)


def test_what_is_timed_and_what_is_judged_can_differ() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    compare({"m": model}, DATA, inputs=torch.zeros(9, 6), **QUICK)
    assert set(seen) == {4, 9}
    assert seen[0] == 9


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        ({}, {}, "compare() takes models as {name: model}, at least one"),
        ([net()], {}, "compare() takes models as {name: model}, at least one"),
        ({"a": net()}, {"reference": "b"}, "reference='b' is none of the models: a"),
        ({"a": net()}, {"better": "more"}, "better='more': say whether"),
        ({"a": failing}, {}, "the reference 'a' can't be called with the inputs: RuntimeError: no"),
        ({"a": net()}, {"data": []}, "data gave no batch at all, so there is nothing to time"),
        (
            {"a": net()},
            {"data": DATA[0]},
            "data is one input (a Tensor), not an iterable of inputs",
        ),
        ({"a": 3}, {}, "a is a int, which can't be called"),
    ],
)
def test_what_can_not_be_compared_is_said(
    models: Any, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"data": DATA, **arguments}
    with pytest.raises(MeasureError) as error:
        compare(models, arguments.pop("data"), **QUICK, **arguments)
    assert message in str(error.value)


def test_a_long_reason_is_cut() -> None:
    assert len(comparing._reason(ValueError("x" * 1000))) == 300
    assert comparing._reason(ValueError()) == "ValueError: no message"
