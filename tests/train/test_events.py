"""TensorBoard gets each step's losses once, resumed or not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.errors import TrainError
from fxopt.train import History, Logits, distill
from fxopt.train.history import Evaluation

DATA = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def run(tmp_path: Path, **options: Any) -> History:
    given: dict[str, Any] = {
        "terms": [Logits()], "epochs": 2, "log_dir": tmp_path / "events", "log_every": 2,
        "checkpoint": tmp_path / "run.pt", "resume": True, "save_every": 1, **options,
    }  # fmt: skip
    return distill(linear(0), linear(1), DATA, **given).history


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        found[name] = {event.step: event.value for event in events.Scalars(name)}
        assert len(found[name]) == len(events.Scalars(name)), "a step was written twice"
    return found


def test_every_step_and_evaluation_is_written(tmp_path: Path) -> None:
    history = run(tmp_path, evaluate=lambda student: {"accuracy": 0.5})
    found = scalars(tmp_path / "events")
    assert set(found) == {
        "loss/total", "loss/logits", "train/learning_rate", "evaluation/accuracy",
    }  # fmt: skip
    for name in ("total", "logits"):
        wanted = dict(enumerate(history.losses[name], 1))
        assert found[f"loss/{name}"] == pytest.approx(wanted, rel=1e-6)
    assert found["evaluation/accuracy"] == {4: 0.5, 8: 0.5}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")

    def fail(line: str) -> None:
        if line.startswith("step 6"):
            raise RuntimeError("power")

    with pytest.raises(RuntimeError):
        run(tmp_path, progress=fail, save_every=5)
    history = run(tmp_path, save_every=5)
    assert history.losses == whole.losses
    found = scalars(tmp_path / "events")
    assert found["loss/total"] == pytest.approx(
        dict(enumerate(history.losses["total"], 1)), rel=1e-6
    )


def test_without_tensorboard_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError) as caught:
        run(tmp_path)
    assert str(caught.value) == (
        "log_dir= writes TensorBoard events, and tensorboard isn't installed: pip install "
        "tensorboard, or leave log_dir out"
    )
    assert not list(tmp_path.iterdir())


def test_a_history_survives_json_and_prints_itself() -> None:
    history = History(
        {"total": [2.0, 1.0], "logits": [4.0, 2.0]}, [0.1, 0.05], [Evaluation(1, 2, {"f1": 0.25})]
    )
    assert History.from_plain(history.to_plain()) == history
    assert str(history) == (
        "2 steps; total 2 -> 1; last: loss 1 (logits 2), lr 0.05\nafter epoch 1 (step 2): f1 0.25"
    )
    assert str(History()) == "no step taken"
