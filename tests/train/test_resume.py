"""A run stopped anywhere goes on from its checkpoint to the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fxopt.device import Device, HalfChoice
from fxopt.errors import TrainError
from fxopt.train import Distilled, Hidden, Logits, Task, distill
from fxopt.train.checkpoint import check_is_plain, write_checkpoint
from fxopt.train.interrupts import deferred_interrupts
from fxopt.train.rng_state import rng_state, rng_state_kept, set_rng_state
from tests.captured import trainable
from tests.train.models import bert, rows, state_of, text_batch

STATES = {"output_hidden_states": True}


class StopError(Exception):
    """What stops a run, as a power cut would: nothing of fxopt handles it."""


class Noisy(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augments its rows by Python's, NumPy's and torch's generators."""

    def __init__(self) -> None:
        self.rows = rows(12)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = dict(self.rows[index])
        if random.random() < 0.5:
            row["input_ids"] = row["input_ids"].roll(int(torch.randint(3, ())))
        return row


def loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3))


def student(capture: bool = False) -> Any:
    """With dropout, so that every step draws."""
    model = bert(1, 8, dropout=0.2, seed=1, **STATES)
    return trainable(model, {**text_batch(0), **STATES}) if capture else model


def run(one: nn.Module, path: Path | None, stop_at: int | None = None, **options: Any) -> Distilled:
    """12 steps of two batches of 2 in two epochs and a half; stopped at a logged step."""

    def progress(line: str) -> None:
        if stop_at is not None and line.startswith(f"step {stop_at} of"):
            raise StopError

    given: dict[str, Any] = {
        "terms": [Task(), Logits(), Hidden()], "steps": 8, "accumulate": 2, "learning_rate": 0.01,
        "data": loader(Noisy()), "log_every": 1, "checkpoint": path, "resume": path is not None,
        **options,
    }  # fmt: skip
    return distill(one, bert(2, **STATES), progress=progress, **given)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    expected = state_of(other)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("stop_at", "capture"), [(2, False), (3, False), (4, False), (7, False), (5, True)]
)
def test_a_resumed_run_ends_at_the_same_weights(
    tmp_path: Path, stop_at: int, capture: bool
) -> None:
    """Stopped within the first epoch, at its end, and in the third; 3 steps an epoch."""
    whole = student(capture)
    done = run(whole, None, evaluate=lambda one: {"one": float(torch.rand(()))})
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"save_every": 2, "evaluate": lambda one: {"one": random.random()}}
    with pytest.raises(StopError):
        run(student(capture), path, stop_at, **options)
    kept = torch.load(path, weights_only=True)["position"]["step"] if path.exists() else 0
    assert stop_at - kept <= 2
    again = student(capture)
    resumed = run(again, path, **options)
    assert resumed.resumed_at == kept
    assert_same(again, whole)
    assert resumed.history.losses == done.history.losses
    assert resumed.history.learning_rates == done.history.learning_rates
    assert [one.step for one in resumed.history.evaluations] == [3, 6, 8]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    whole, again = student(), student()
    done = run(whole, tmp_path / "run.pt")
    resumed = run(again, tmp_path / "run.pt")
    assert_same(again, whole)
    assert resumed.resumed_at == done.history.steps == resumed.history.steps == 8
    assert not [path for path in tmp_path.iterdir() if path.name != "run.pt"]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "learning_rate": None},
        {"schedule": lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, steps)},
        {"schedule": lambda o, steps: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5])},
        {"schedule": "constant", "clip": None},
        {"data": rows(12), "batch_size": 2},
        {"data": DataLoader(Noisy(), 2, shuffle=True, num_workers=1)},
        {"data": [text_batch(index) for index in range(6)]},
        {"steps": None, "epochs": 3},
    ],
    ids=["sgd", "one-cycle", "multi-step", "constant", "dataset", "workers", "list", "epochs"],
)
def test_whatever_is_used_is_resumed(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, again = student(), student()
    run(whole, None, **options)
    stops = {"stop_at": None} if options.get("epochs") else {"stop_at": 5}
    if stops["stop_at"]:
        with pytest.raises(StopError):
            run(student(), tmp_path / "run.pt", save_every=1, **stops, **options)
    else:
        with pytest.raises(ZeroDivisionError):
            run(student(), tmp_path / "run.pt", evaluate=lambda one: {"one": 1 // 0}, save_every=1,
                **options)  # fmt: skip
    run(again, tmp_path / "run.pt", **options)
    assert_same(again, whole)


def test_a_loss_scale_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "half", lambda self: HalfChoice(torch.float16, "because"))

    def overflowing() -> Any:
        """The third step overflows, counted by the state, which a checkpoint holds."""
        one = student()
        one.register_buffer("count", torch.zeros(()))

        def grow(gradient: Tensor) -> Tensor:
            one.count += 1
            return gradient * torch.inf if one.count == 6 else gradient

        one.classifier.weight.register_hook(grow)
        return one

    options: dict[str, Any] = {"precision": "mixed", "save_every": 1}
    whole, again = overflowing(), overflowing()
    done = run(whole, None, **{**options, "save_every": None})
    assert done.history.skipped == 1
    with pytest.raises(StopError):
        run(overflowing(), tmp_path / "run.pt", 5, **options)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0**15
    run(again, tmp_path / "run.pt", **options)
    assert_same(again, whole)


def test_ctrl_c_waits_for_the_end_of_the_step_and_keeps_it(tmp_path: Path) -> None:
    class Interrupted(nn.Module):
        """Signals its process in the middle of the fifth step's first batch."""

        def __init__(self, at: int | None) -> None:
            super().__init__()
            self.inner, self.calls, self.at = student(), 0, at

        def forward(self, **batch: Tensor) -> Any:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return self.inner(**batch)

    handler = signal.getsignal(signal.SIGINT)
    path, whole, again = tmp_path / "run.pt", Interrupted(None), Interrupted(None)
    run(whole, None)
    stopped = Interrupted(1 + 2 * 4 + 1)  # after the dry run's call and four steps
    with pytest.raises(KeyboardInterrupt):
        run(stopped, path)
    assert signal.getsignal(signal.SIGINT) is handler
    state = torch.load(path, weights_only=True)
    assert state["position"] == {"epoch": 1, "batch": 4, "step": 5}
    assert torch.equal(state["student"]["inner.classifier.bias"], stopped.inner.classifier.bias)
    assert run(again, path).resumed_at == 5
    assert_same(again, whole)


def test_an_interrupt_from_a_callback_is_kept_too(tmp_path: Path) -> None:
    def interrupt(one: nn.Module) -> dict[str, float]:
        raise KeyboardInterrupt

    whole, again, path = student(), student(), tmp_path / "run.pt"
    run(whole, None)
    with pytest.raises(KeyboardInterrupt):
        run(student(), path, evaluate=interrupt)
    assert torch.load(path, weights_only=True)["position"]["step"] == 3
    run(again, path)
    assert_same(again, whole)


def test_a_half_made_step_is_not_kept(tmp_path: Path) -> None:
    """An interrupt that doesn't wait, after the fifth step changed the weights: the checkpoint
    stays the fourth's."""

    class Interrupted(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:
            super().step()
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"learning_rate": None, "save_every": 4}
    path, whole, again = tmp_path / "run.pt", student(), student()
    with pytest.raises(KeyboardInterrupt):
        run(student(), path, optimizer=partial(Interrupted, lr=0.1), **options)
    plain = partial(torch.optim.SGD, lr=0.1)
    run(whole, None, optimizer=plain, learning_rate=None)
    assert run(again, path, optimizer=partial(Interrupted, lr=0.1), **options).resumed_at == 4
    assert_same(again, whole)


def test_the_second_ctrl_c_does_not_wait() -> None:
    with deferred_interrupts() as found:
        os.kill(os.getpid(), signal.SIGINT)
        assert found.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_left_alone_in_other_threads() -> None:
    handlers = []

    def look() -> None:
        with deferred_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [before]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train import test_resume as tests

class Killed(tests.StopError):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)

tests.StopError = Killed
tests.run(tests.student(), Path(sys.argv[1]), 5, save_every=2)
"""


def test_a_killed_process_loses_at_most_save_every_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert torch.load(path, weights_only=True)["position"]["step"] == 4
    whole, again = student(), student()
    run(whole, None)
    assert run(again, path).resumed_at == 4
    assert_same(again, whole)


def test_a_failed_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    write_checkpoint(path, {"step": 1})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainError) as caught:
        write_checkpoint(path, {"step": 2})
    assert str(caught.value) == (
        f"the checkpoint {path} can't be written: [Errno 28] No space left on device"
    )
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["run.pt"]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(student(), path)
    with pytest.raises(TrainError) as caught:
        run(student(), path, resume=False)
    assert str(caught.value) == (
        f"checkpoint={str(path)!r} exists: give resume=True to go on from it, or remove it to "
        "start anew"
    )


def test_checkpoints_of_other_runs_and_students_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(student(), path)
    with pytest.raises(TrainError) as caught:
        run(student(), path, accumulate=3, seed=1)
    assert str(caught.value) == (
        f"{path} was written by another run: accumulate was 2 and is 3; seed was 0 and is 1. Go on "
        "with what it was, or give another checkpoint="
    )
    with pytest.raises(TrainError, match="was written for another student or optimizer: Error"):
        run(bert(1, 12, **STATES), path)


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "other"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run.pt"
    run(student(), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("no checkpoint")
    elif damage == "pickle":
        torch.save({"format": 1, "settings": Path("code")}, path)
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(TrainError) as caught:
        run(student(), path)
    if damage == "other":
        expected = f"{path} is no checkpoint of fxopt.train.distill, format 1"
        assert str(caught.value) == expected
    else:
        assert str(caught.value).startswith(f"{path} can't be read as a checkpoint: ")
        assert str(caught.value).endswith(". Remove it to start anew")


def test_a_schedule_that_needs_pickle_is_refused_before_training(tmp_path: Path) -> None:
    class Strange(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "path": Path("x")}

    with pytest.raises(TrainError, match="optimizer and schedule can't be kept in a checkpoint"):
        run(student(), tmp_path / "run.pt", schedule=lambda optimizer, steps: Strange(optimizer))
    with pytest.raises(TrainError) as caught:
        check_is_plain({"schedule": lambda: None})
    assert str(caught.value).endswith(
        "Leave checkpoint= out, or use one whose state_dict() holds tensors and numbers only"
    )


def everything_drawn(generator: torch.Generator) -> Iterator[float]:
    import numpy as np

    yield random.random()
    yield random.gauss(0, 1)
    yield float(np.random.rand())
    yield float(torch.rand(()))
    yield float(torch.rand((), generator=generator))


def test_draws_are_put_back_also_through_a_file(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(0)
    random.gauss(0, 1)  # leaves a second one in Python's generator
    torch.save(rng_state([own]), tmp_path / "draws.pt")
    first = list(everything_drawn(own))
    set_rng_state(torch.load(tmp_path / "draws.pt", weights_only=True), [own])
    with rng_state_kept([own]):
        assert list(everything_drawn(own)) == first
    assert list(everything_drawn(own)) == first
