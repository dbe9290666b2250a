"""Who works on a trial, whether that worker lives, and how its trial is had back if it doesn't.

A worker signs each trial that it begins. A trial whose worker is gone, by its process (on this
machine) or by its heartbeat (on any), is put back in the queue: a killed worker loses at most that.
A worker that was only slow finds its trial ended by another; see `worker`.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.search.interrupts import held_back

if TYPE_CHECKING:
    import optuna

WORKER, OUTCOME = "worker", "outcome"
_log = logging.getLogger(__name__)
# A list that kills its worker (out of memory) must not do so for ever.
_MOST_RETRIES = 2
# From beginning a trial to signing it there may be a lock to wait for.
_UNSIGNED_SECONDS = 180


def begin_trial(study: optuna.Study) -> optuna.trial.Trial:
    """The next trial of the queue, or one that the sampler proposes, signed by this worker.

    Raises `UpdateFinishedTrialError` where another worker has ended it by then.
    """
    from optuna.storages import fail_stale_trials

    fail_stale_trials(study)
    trial = study.ask()
    sign(trial)
    return trial


def sign(trial: optuna.trial.Trial) -> None:
    """Say who works on `trial`."""
    trial.set_user_attr(WORKER, signature())


def signature() -> dict[str, Any]:
    """This process, as a trial says who works on it."""
    return {"node": platform.node(), "pid": os.getpid(), "since": _since(os.getpid())}


@contextmanager
def beating(study: optuna.Study, number: int) -> Iterator[None]:
    """Inside, the storage is told now and then that a trial's worker lives.

    A beat that doesn't come through, since others have locked the database, is left out.
    """
    storage: Any = study._storage
    interval = getattr(storage, "get_heartbeat_interval", lambda: None)()
    if interval is None:
        yield
        return
    trial = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    ended = threading.Event()

    def beat() -> None:
        while True:
            try:
                storage.record_heartbeat(trial)
            except Exception:  # of any database's driver; it must not end the beating
                _log.debug("a heartbeat of trial %d didn't come through", number, exc_info=True)
            if ended.wait(interval):
                storage.remove_session()
                return

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def put_back_dead(study: optuna.Study) -> int:
    """Queue the running trials whose worker, on this machine, is gone; how many there were."""
    from optuna.trial import TrialState

    gone = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if _is_gone(trial)
    ]
    return sum(give_back(study, trial.number) for trial in gone)


def give_back(study: optuna.Study, number: int) -> bool:
    """End a trial without an outcome and queue it once more; False where another has ended it."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with held_back():
        try:
            ended = study.tell(number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            if is_ended(study, number):
                return False
            raise
        put_back(study, ended)
    return True


def is_ended(study: optuna.Study, number: int) -> bool:
    """Whether a trial has a state that can't be changed any more."""
    return study.get_trials(deepcopy=False)[number].state.is_finished()


def put_back(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue an unfinished trial once more, unless it has been too often.

    Not with the signature of the worker that had it: the next one would be taken for that, and for
    dead, until it has signed.
    """
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    again = copy.deepcopy(trial)
    for name in (WORKER, OUTCOME):
        again.user_attrs.pop(name, None)
    RetryHeartbeatStaleTrialCallback(max_retry=_MOST_RETRIES)(study, again)


def _is_gone(trial: optuna.trial.FrozenTrial) -> bool:
    worker = trial.user_attrs.get(WORKER)
    if worker is None:
        # Its worker has ended before it could sign.
        begun = trial.datetime_start
        return begun is not None and datetime.now() - begun > timedelta(seconds=_UNSIGNED_SECONDS)
    # On Windows the signal 0 would be Ctrl-C.
    here = os.name == "posix" and isinstance(worker, dict) and worker["node"] == platform.node()
    if not here:
        return False
    pid = int(worker["pid"])
    if pid == os.getpid() and worker["since"] == _since(pid):
        return False
    return not _is_alive(pid) or worker["since"] != _since(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _since(pid: int) -> str:
    """When a process began, since its number may be given out again; empty where unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The second field is the command in parentheses; the 22nd is the start (proc(5)).
    fields = text.rpartition(")")[2].split()
    if fields[0] == "Z":
        return "ended"
    return fields[19]
