"""Where a study is kept: memory, a SQLite file, or a database by URL."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fxopt.errors import SearchError
from fxopt.search.signs_of_life import put_back

if TYPE_CHECKING:
    import optuna

_HEARTBEAT_SECONDS, _GRACE_SECONDS = 10, 120
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
            # It knows the heartbeats of its own loop alone; ours are in `signs_of_life`.
            warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
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
                heartbeat_stale_trial_callback=put_back,
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


@contextmanager
def study_there(study: optuna.Study) -> Iterator[None]:
    """Inside, that somebody has deleted the study becomes a `SearchError`."""
    try:
        yield
    except (KeyError, ValueError) as error:
        import optuna

        name = study.study_name
        if name not in optuna.get_all_study_names(storage=study._storage):
            raise SearchError(
                f"the study {name!r} was deleted from its storage while the search went on: begin "
                "again, or give another study="
            ) from error
        raise
