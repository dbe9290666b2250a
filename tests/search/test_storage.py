"""Nothing finished is lost: not by a SIGKILL, not by a machine that falls silent."""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import example, given
from hypothesis import strategies as st

from fxopt.search import Found, SearchError, search, signs_of_life, storage
from fxopt.search.quiet import Turns
from fxopt.search.signs_of_life import WORKER
from fxopt.search.storage import open_storage, quiet_optuna, storage_url
from tests.search.small import INPUTS, SPACE, KillsItself, by_graph, constant, mlp, slow_by_graph

optuna = pytest.importorskip("optuna")
# It would rather have its own loop; the tests take single trials to break them.
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")

ROOT = Path(__file__).parents[2]


def resume(where: str | Path, **options: Any) -> Found:
    given: dict[str, Any] = {
        "metric": constant, "tolerance": 1.0, "trials": 12, "space": SPACE, "measure": by_graph,
        **options,
    }  # fmt: skip
    return search(mlp(), INPUTS, storage=where, **given)


def trials_in(where: str | Path) -> list[Any]:
    with quiet_optuna():
        study = optuna.load_study(study_name="fxopt", storage=open_storage(storage_url(where)))
        return list(study.get_trials(deepcopy=False))


def test_a_sigkill_loses_its_own_trial_only(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    # The first call judges the original, and each trial calls once.
    command = [sys.executable, "-m", "tests.search.killed", str(file), str(tmp_path), "5", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = trials_in(file)
    killed = left[-1]
    assert killed.state.name == "RUNNING"
    finished = [trial for trial in left if trial.state.is_finished()]
    assert sum("outcome" in trial.user_attrs for trial in finished) >= 3

    found = resume(file)
    after = trials_in(file)
    for trial in finished:
        same = after[trial.number]
        assert (same.state, same.values, same.user_attrs) == (
            trial.state, trial.values, trial.user_attrs,
        )  # fmt: skip
    assert found.trials[killed.number].state == "lost"
    again = found.trials[killed.number + 1]
    assert again.passes == found.trials[killed.number].passes
    assert again.state == "measured"
    assert sum(trial.counts for trial in found.trials) == 12


def test_an_interrupt_ends_the_workers_and_keeps_what_they_measured(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    command = [sys.executable, "-m", "tests.search.killed", str(file), str(tmp_path), "99", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    next(line for line in lines if line.startswith("trial "))
    process.send_signal(signal.SIGINT)
    last = list(lines)[-1]
    assert process.wait(60) == 0
    assert last == "interrupted: True, on the front: 1\n"
    assert all(trial.state.name != "RUNNING" for trial in trials_in(file))
    assert sum(trial.counts for trial in resume(file).trials) == 12


def test_a_list_that_always_kills_its_worker_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    resume(file, trials=1)
    with quiet_optuna():
        study = optuna.load_study(study_name="fxopt", storage=open_storage(storage_url(file)))
        study.enqueue_trial({"1: canonicalize": "canonicalize"})
        for attempt in range(3):
            trial = study.ask()
            trial.set_user_attr("passes", "the bad list")
            gone = {"node": platform.node(), "pid": 2**22 + 1, "since": "1"}
            trial.set_user_attr(WORKER, gone)
            assert signs_of_life.put_back_dead(study) == 1
            queued = [t for t in study.get_trials() if t.state.name == "WAITING"]
            assert len(queued) == (1 if attempt < 2 else 0)


def test_a_silent_machine_is_noticed_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "_GRACE_SECONDS", 2)
    file = tmp_path / "search.db"
    resume(file, trials=1)
    with quiet_optuna():
        kept = open_storage(storage_url(file))
        study = optuna.load_study(study_name="fxopt", storage=kept)
        trial = study.ask()
        trial.set_user_attr(WORKER, {"node": "elsewhere", "pid": 1, "since": "1"})
        kept.record_heartbeat(trial._trial_id)
    assert signs_of_life.put_back_dead(study) == 0
    time.sleep(3)
    found = resume(file, trials=4)
    assert found.trials[trial.number].state == "lost"
    assert sum(one.counts for one in found.trials) == 4


def test_a_trial_of_a_living_worker_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    resume(file, trials=1)
    with quiet_optuna():
        study = optuna.load_study(study_name="fxopt", storage=open_storage(storage_url(file)))
        trial = study.ask()
        signs_of_life.sign(trial)
        assert signs_of_life.put_back_dead(study) == 0
        taken_over = {**trial.user_attrs[WORKER], "since": "long ago"}
        trial.set_user_attr(WORKER, taken_over)
        assert signs_of_life.put_back_dead(study) == 1


def test_one_measures_while_nobody_builds() -> None:
    pytest.importorskip("fcntl")
    name = f"test {os.getpid()}"
    order: list[str] = []

    def measure() -> None:
        with Turns(name).alone():
            order.append("measured")

    with Turns(name).beside_others():
        with Turns(name).beside_others():
            order.append("two build")
        thread = threading.Thread(target=measure)
        thread.start()
        time.sleep(0.2)
        order.append("built")
    thread.join()
    assert order == ["two build", "built", "measured"]
    path = Turns(name).path
    assert path is not None
    path.unlink()


def test_what_cannot_be_sent_to_a_worker_is_said(tmp_path: Path) -> None:
    with pytest.raises(SearchError) as caught:
        resume(tmp_path / "search.db", workers=2, metric=lambda model, data: 1.0)
    assert str(caught.value).startswith(
        "workers= starts processes, and model, data and metric can't be sent to them: "
    )
    assert str(caught.value).endswith(
        "Define the metric at the top of a module, not as a lambda, or leave workers out"
    )


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL of our own, on a socket in a temporary folder."""
    pytest.importorskip("psycopg")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl aren't on the path")
    prefix: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="fxopt-postgres-"))
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        owner = next((u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None)
        if owner is None or shutil.which("runuser") is None:
            pytest.skip("running as root, and there is no other user to run PostgreSQL as")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        prefix = ["runuser", "-u", owner.pw_name, "--"]

    def run(*command: str) -> None:
        done = subprocess.run(
            [*prefix, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout.decode()

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "fxopt", "--auth=trust", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://fxopt@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_share_a_postgresql_and_one_may_die(postgres: str, tmp_path: Path) -> None:
    lines: list[str] = []
    found = resume(
        postgres, workers=2, metric=KillsItself(tmp_path, 3), measure=slow_by_graph,
        progress=lines.append,
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    assert found.notes == ("a worker died (exit code -9); its trial is in the queue again",)
    counted = [trial for trial in found.trials if trial.counts]
    assert len(counted) == 12
    assert {trial.state for trial in counted} == {"measured"}
    assert [trial.state for trial in found.trials].count("lost") == 1
    finished = [t for t in trials_in(postgres) if "outcome" in t.user_attrs]
    assert len({t.user_attrs[WORKER]["pid"] for t in finished}) == 2
    assert sum(line.startswith("trial ") for line in lines) == len(counted)

    more = resume(postgres, trials=14)
    assert more.trials[: len(found.trials)] == found.trials
    assert sum(trial.counts for trial in more.trials) == 14
    assert more.pareto


# Without what no file's name may hold; a name of dots alone is a folder's.
_NAMES = st.text(
    st.one_of(st.sampled_from("%?#{}@:&=+ ;é4125"), st.characters(codec="utf-8", categories=["L"])),
    min_size=1,
    max_size=12,
)


@given(folder=_NAMES, file=_NAMES)
@example("50%?x#y", "study.db")
@example("%41", "100%25?mode=ro&uri=true")
def test_a_path_of_any_characters_is_that_file(folder: str, file: str) -> None:
    path = Path("/studies") / folder / file
    url = storage_url(path)
    assert url is not None
    engine = sqlalchemy.create_engine(url)
    (name,), _ = engine.dialect.create_connect_args(engine.url)
    assert name == str(path)


def test_a_study_lands_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "50%?x#y"
    folder.mkdir()
    resume(str(folder / "study.db"), trials=1)
    assert [path.name for path in tmp_path.iterdir()] == ["50%?x#y"]
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert len(resume(folder / "study.db", trials=1).trials) == 1


def _overwritten(file: Path, start: int, end: int) -> None:
    content = bytearray(file.read_bytes())
    content[start:end] = b"x" * (min(end, len(content)) - start)
    file.write_bytes(content)


@pytest.mark.parametrize(("start", "end"), [(0, 64), (100, 4096), (4096, 1 << 30)])
def test_a_damaged_database_is_named(start: int, end: int, tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    resume(file, trials=1)
    _overwritten(file, start, end)
    with pytest.raises(SearchError) as caught:
        resume(file, trials=2)
    text = str(caught.value)
    assert text.startswith(f"storage='sqlite:///{file}' can't be opened: ")
    assert "to a file that is new or that a search has written and that isn't damaged" in text


def test_a_storage_of_no_use_is_found_before_the_model_is_judged(tmp_path: Path) -> None:
    judged = []
    with pytest.raises(SearchError, match="unable to open database file"):
        resume(tmp_path / "no" / "study.db", metric=lambda *given: judged.append(given))
    assert not judged
