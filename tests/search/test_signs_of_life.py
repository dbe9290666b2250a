"""A worker that lives is left alone, goes on when it wasn't, and leaves no trial running."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from fxopt.search import (
    Found,
    Measured,
    SearchError,
    TrialRecord,
    search,
    signs_of_life,
    storage,
    worker,
)
from fxopt.search.ending import Ending, write
from fxopt.search.signs_of_life import WORKER, begin_trial, give_back, put_back_dead
from fxopt.search.storage import open_storage, quiet_optuna, storage_url
from fxopt.search.study import MACHINE, PASSES
from tests.search.small import INPUTS, SPACE, by_graph, constant, mlp

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")

DEAD = {"node": platform.node(), "pid": 2**22 + 1, "since": "1"}


def run(file: Path, **options: Any) -> Found:
    given: dict[str, Any] = {
        "metric": constant, "tolerance": 1.0, "trials": 4, "space": SPACE, "measure": by_graph,
        **options,
    }  # fmt: skip
    return search(mlp(), INPUTS, storage=file, **given)


def opened(file: Path) -> Any:
    """The study as another process would open it."""
    with quiet_optuna():
        return optuna.load_study(study_name="fxopt", storage=open_storage(storage_url(file)))


def states(file: Path) -> list[str]:
    return [trial.state.name for trial in opened(file).get_trials(deepcopy=False)]


def at_call(call: int, act: Callable[[], object]) -> Callable[..., Measured]:
    """A measuring that does something else first at one of its calls."""
    calls = 0

    def measure(*given: Any) -> Measured:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return by_graph(*given)

    return measure


def running(study: Any) -> int:
    (number,) = (t.number for t in study.get_trials() if t.state.name == "RUNNING")
    return int(number)


def test_a_list_that_was_put_back_is_not_taken_for_dead_before_it_is_signed(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    run(file, trials=1)
    study = opened(file)
    study.enqueue_trial({"1: canonicalize": "canonicalize"})
    study.ask().set_user_attr(WORKER, DEAD)
    assert put_back_dead(study) == 1
    again = study.ask()
    assert WORKER not in again.user_attrs
    assert put_back_dead(opened(file)) == 0
    signs_of_life.sign(again)
    assert put_back_dead(opened(file)) == 0


def test_a_worker_that_died_before_it_signed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.db"
    run(file, trials=1)
    study = opened(file)
    study.ask()
    assert put_back_dead(study) == 0
    monkeypatch.setattr(signs_of_life, "_UNSIGNED_SECONDS", -1)
    assert put_back_dead(study) == 1


@pytest.mark.parametrize("state", ["FAIL", "PRUNED", "COMPLETE"])
def test_a_trial_that_another_process_ends_is_recorded_anew(state: str, tmp_path: Path) -> None:
    file = tmp_path / "search.db"

    def end() -> None:
        study = opened(file)
        if state == "FAIL":
            assert give_back(study, running(study))
        else:
            values = [9.0] if state == "COMPLETE" else None
            study.tell(running(study), values, optuna.trial.TrialState[state])

    found = run(file, measure=at_call(2, end))
    lost = found.trials[1]
    assert lost.state == "lost"
    (anew,) = (t for t in found.trials if t.number > 1 and t.passes == lost.passes and t.counts)
    assert (
        lost.reason
        == f"taken for lost while its worker lived; what it found is trial {anew.number}"
    )
    assert found.notes == (f"trial 1 was {lost.reason}",)
    assert anew.state == "measured"
    assert anew.ratios
    assert sum(trial.counts for trial in found.trials) == 4
    kept = opened(file).get_trials()[anew.number]
    assert (kept.state.name, kept.values) == ("COMPLETE", [anew.ratios["latency"]])
    assert kept.constraints == {"metric": -1.0}
    for trial in found.trials:
        if trial.passes == lost.passes and trial.number not in (1, anew.number):
            assert trial.same_as == anew.number or trial.state == "waiting"
    assert "RUNNING" not in states(file)


def test_what_another_worker_has_measured_by_then_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "search.db"

    def end_and_measure() -> None:
        study = opened(file)
        lost = running(study)
        give_back(study, lost)
        attributes = study.get_trials()[lost].user_attrs
        other = begin_trial(study)
        for name in (PASSES, MACHINE):
            other.set_user_attr(name, attributes[name])
        record = TrialRecord(
            other.number, attributes[PASSES], "measured", ratios={"latency": 0.25}, metric=1.0,
            machine=attributes[MACHINE],
        )  # fmt: skip
        write(study, other, Ending(record, ("latency",), -1.0))

    found = run(file, measure=at_call(2, end_and_measure))
    same = [t for t in found.trials if t.passes == found.trials[1].passes and t.state == "measured"]
    assert [one.counts for one in same].count(True) == 1
    assert sum(trial.counts for trial in found.trials) == 4
    assert len(found.notes) == 1


def test_a_trial_that_is_ended_once_its_outcome_is_written_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.db"
    tell, ended = optuna.Study.tell, []

    def late(self: Any, *given: Any, **named: Any) -> Any:
        if not ended:
            ended.append(True)
            study = opened(file)
            tell(study, running(study), state=optuna.trial.TrialState.FAIL)
        return tell(self, *given, **named)

    monkeypatch.setattr(optuna.Study, "tell", late)
    found = run(file)
    assert found.trials[0].state == "measured"
    assert found.notes == ()
    assert sum(trial.counts for trial in found.trials) == 4


def test_a_trial_that_is_ended_before_it_began_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.db"
    begun: list[int] = []

    def ended_at_once(study: Any) -> Any:
        trial = begin_trial(study)
        begun.append(trial.number)
        if len(begun) == 2:
            give_back(opened(file), trial.number)
        return trial

    monkeypatch.setattr(worker, "begin_trial", ended_at_once)
    found = run(file)
    assert found.trials[begun[1]].state == "lost"
    assert (
        found.trials[begun[1]].reason == "interrupted, or its worker died or gave no sign of life"
    )
    assert sum(trial.counts for trial in found.trials) == 4


MOMENTS = {
    "while it begins": (signs_of_life, "sign"),
    "while it ends": (worker, "write"),
    "while others are put back": (worker, "put_back_dead"),
    "while it proposes": (worker.Worker, "_known"),
    "while it is judged": (worker.Worker, "_judged"),
}


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_leaves_no_trial_running(
    moment: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.db"
    owner, name = MOMENTS[moment]
    whole, put_back, calls = getattr(owner, name), signs_of_life.put_back, []

    def interrupted(*given: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*given)

    def interrupted_again(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        put_back(*given)

    monkeypatch.setattr(owner, name, interrupted)
    if again:
        monkeypatch.setattr(signs_of_life, "put_back", interrupted_again)
    found = run(file)
    assert found.interrupted
    assert "RUNNING" not in states(file)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    resumed = run(file)
    assert sum(trial.counts for trial in resumed.trials) == 4
    lost = {trial.passes for trial in found.trials if trial.state == "lost"} - {""}
    assert lost <= {trial.passes for trial in resumed.trials if trial.state == "measured"}


def test_what_exits_leaves_no_trial_running(tmp_path: Path) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(tmp_path / "search.db", measure=at_call(2, leave))
    assert states(tmp_path / "search.db")[:3] == ["COMPLETE", "FAIL", "WAITING"]


def test_a_study_that_is_deleted_meanwhile_is_said(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    url = storage_url(file)

    def delete() -> None:
        optuna.delete_study(study_name="fxopt", storage=open_storage(url))

    with quiet_optuna(), pytest.raises(SearchError) as caught:
        run(file, measure=at_call(2, delete))
    assert str(caught.value) == (
        "the study 'fxopt' was deleted from its storage while the search went on: begin again, or "
        "give another study="
    )


def test_a_storage_that_is_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    with pytest.raises(SearchError) as caught:
        run(file, measure=at_call(2, lambda: file.write_bytes(b"x" * 8192)))
    assert str(caught.value).startswith(f"storage='sqlite:///{file}' can't be opened: ")


def test_a_heartbeat_that_does_not_come_through_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[int] = []

    def locked(self: Any, trial: int) -> None:
        beats.append(trial)
        raise DBAPIError("INSERT", {}, Exception("database is locked"))

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", locked)
    found = run(tmp_path / "search.db")
    assert len(beats) >= 4
    assert {trial.state for trial in found.trials} <= {"measured", "waiting"}


def test_a_worker_beats_as_long_as_its_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "_GRACE_SECONDS", 2)
    file = tmp_path / "search.db"
    seen: list[int] = []

    def others_look() -> None:
        time.sleep(4)
        study = opened(file)
        optuna.storages.fail_stale_trials(study)
        seen.append(running(study))

    with quiet_optuna():
        found = run(file, trials=2, measure=at_call(2, others_look))
    assert seen == [1]
    assert found.trials[1].state == "measured"
