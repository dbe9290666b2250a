"""Whose turn it is on this machine: many build at once, one measures, alone.

A lock on a file, which the operating system lets go of when a process dies. Where there is no
`fcntl` (Windows) nobody waits, and several workers disturb each other's timings.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Turns:
    """The turns of all workers of one study on this machine; without a name, of nobody else."""

    def __init__(self, name: str | None = None) -> None:
        self.path: Path | None = None
        self.fcntl: Any = None
        if name is not None and importlib.util.find_spec("fcntl") is not None:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            self.path = Path(tempfile.gettempdir()) / f"fxopt-search-{digest}.lock"
            self.fcntl = importlib.import_module("fcntl")

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Inside, nobody measures."""
        with self._held("LOCK_SH"):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, nobody else builds or measures."""
        with self._held("LOCK_EX"):
            yield

    @contextmanager
    def _held(self, kind: str) -> Iterator[None]:
        if self.path is None:
            yield
            return
        with self.path.open("a") as file:
            self.fcntl.flock(file, getattr(self.fcntl, kind))
            try:
                yield
            finally:
                self.fcntl.flock(file, self.fcntl.LOCK_UN)
