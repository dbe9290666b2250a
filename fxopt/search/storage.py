"""Where a study is kept: memory, a SQLite file, or a database by URL; and who works on it.

A worker signs each trial that it begins. A trial whose worker is gone, by its process (on this
machine) or by its heartbeat (on any), is put back in the queue: a killed worker loses at most that.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fxopt.errors import SearchError

if TYPE_CHECKING:
    import optuna

WORKER = "worker"
_HEARTBEAT_SECONDS, _GRACE_SECONDS = 10, 120
# A list that kills its worker (out of memory) must not do so for ever.
_MOST_RETRIES = 2
# Several workers write one SQLite file.
_LOCK_SECONDS = 60


def check_installed() -> None:
    """Raise `SearchError` where optuna isn't installed."""
    if importlib.util.find_spec("optuna") is None:
        raise SearchError(
            "search() needs optuna 5 or later, which isn't installed: pip install 'fxopt[search]'"
        )


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Inside, optuna writes nothing to the terminal, and doesn't warn of what it calls new."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def storage_url(storage: str | Path | None) -> str | None:
    """The SQLAlchemy URL of a storage: a path becomes a SQLite file; None stays None."""
    if storage is None:
        return None
    if isinstance(storage, str) and "://" in storage:
        return storage
    return _file_url(Path(storage).expanduser().absolute())


def _file_url(path: Path) -> str:
    """A URL that SQLAlchemy reads as this very path, whatever characters it holds."""
    from sqlalchemy.engine import make_url

    for text in (str(path), quote(str(path))):
        url = make_url(f"sqlite:///{text}")
        if url.database == str(path) and not url.query:
            return f"sqlite:///{text}"
    raise SearchError(
        f"storage={str(path)!r} can't be written as a database's URL here: give a path without "
        "the characters % ? and #"
    )


def open_storage(url: str | None) -> optuna.storages.BaseStorage:
    """The storage at `url`, in memory for None.

    Raises `SearchError`, without the password, where it can't be opened.
    """
    import optuna

    if url is None:
        return optuna.storages.InMemoryStorage()
    waits = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite") else None
    try:
        with reading(url):
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=waits,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                grace_period=_GRACE_SECONDS,
                heartbeat_stale_trial_callback=_retry(),
            )
    except (ImportError, RuntimeError) as error:
        raise _unusable(url, error) from error


@contextmanager
def reading(url: str | None) -> Iterator[None]:
    """Inside, an error of the storage at `url`, gone or damaged, becomes a `SearchError`."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _unusable(url or "memory", error) from error


def _unusable(url: str, error: BaseException) -> SearchError:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    return SearchError(
        f"storage={without_password(url)!r} can't be opened: {reason}. Give a path, in a folder "
        "that is there, to a file that is new or that a search has written and that isn't damaged; "
        "or a URL such as postgresql+psycopg://user:password@host/name, with its driver installed "
        "(pip install 'fxopt[postgresql]')"
    )


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def sign(trial: optuna.trial.Trial) -> None:
    """Say who works on `trial`."""
    signature = {"node": platform.node(), "pid": os.getpid(), "since": _since(os.getpid())}
    trial.set_user_attr(WORKER, signature)


def put_back_dead(study: optuna.Study) -> int:
    """Queue the running trials whose worker, on this machine, is gone; how many there were."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    count = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_gone(trial.user_attrs.get(WORKER)):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (UpdateFinishedTrialError, ValueError):
                continue  # another worker saw it too
            put_back(study, trial)
            count += 1
    return count


def put_back(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue an unfinished trial once more, unless it has been too often."""
    _retry()(study, trial)


def _retry() -> Any:
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    return RetryHeartbeatStaleTrialCallback(max_retry=_MOST_RETRIES)


def _is_gone(worker: Any) -> bool:
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
