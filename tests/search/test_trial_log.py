"""Each trial is logged once, where that was asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxopt.search import SearchError, TrialRecord
from fxopt.search.trial_log import TrialLog

TRIALS = [
    TrialRecord(0, "canonicalize", "measured", values={"latency_ms": 2.0},
                ratios={"latency": 0.5}, metric=0.9),
    TrialRecord(1, "lower", "pruned", "PassError: no"),
]  # fmt: skip


def test_trials_are_events(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TrialLog(tmp_path, None, "fxopt")
    for trial in TRIALS:
        log.write(trial)
    log.close()
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert scalars == {
        "ratio/latency": [(0, 0.5)],
        "value/latency_ms": [(0, 2.0)],
        "metric": [(0, pytest.approx(0.9))],
    }
    texts = events.Tensors("trial/text_summary")
    said = [event.tensor_proto.string_val[0].decode() for event in texts]
    assert said == [str(trial) for trial in TRIALS]


def test_trials_go_to_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log=logged.append, finish=lambda: logged.append("end"))

    def init(**options: Any) -> SimpleNamespace:
        logged.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    log = TrialLog(None, "my project", "fxopt")
    log.write(TRIALS[0])
    log.close()
    assert logged == [
        {"project": "my project", "name": "fxopt"},
        {"trial": 0, "ratio/latency": 0.5, "value/latency_ms": 2.0, "metric": 0.9,
         "passes": "canonicalize", "state": "measured", "reason": ""},
        "end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("events", None),
            "log_dir= writes TensorBoard events, and tensorboard isn't installed: pip install "
            "tensorboard, or leave log_dir out",
        ),
        (
            (None, "project"),
            "wandb= logs to Weights & Biases, and wandb isn't installed: pip install wandb, or "
            "leave wandb out",
        ),
    ],
)
def test_a_missing_package_is_named(
    options: tuple[str | None, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SearchError) as caught:
        TrialLog(*options, "fxopt")
    assert str(caught.value) == message
