"""Timings that outlive the process: one file each, good for this machine as it is now.

A file's name is a digest of the machine and the question, and both stand in the file as well. It is
written under another name and moved into place, so that a reader, of whatever process, sees all of
it or none. What can't be read, or is no answer to the question, counts as not there and is written
anew; where nothing can be written, timings live as long as the process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.timing.machine import fingerprint

_log = logging.getLogger(__name__)

# What the load of the moment or a Python package can't change about a kernel's speed is left out.
_DECISIVE = ("cpu", "cores", "threads", "isa", "gpu", "os", "torch")

Answer = dict[str, Any]


class TimingStore:
    """Answers by question, in memory and as files of `folder` (None: in memory only).

    Safe to use from several threads and, on one folder, several processes.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def get(self, question: str) -> Answer | None:
        """What was last put for `question` on this machine, or None."""
        name = _digest(question)
        with self._lock:
            known = self._answers.get(name)
        if known is not None or self.folder is None:
            return known
        answer = _read(self.folder / name, question)
        if answer is not None:
            with self._lock:
                self._answers[name] = answer
        return answer

    def put(self, question: str, answer: Mapping[str, Any], keep: bool = True) -> None:
        """Remember `answer` (what JSON can hold); on disk only with `keep`."""
        name = _digest(question)
        with self._lock:
            self._answers[name] = dict(answer)
        if keep and self.folder is not None:
            content = {"machine": machine(), "question": question, "answer": dict(answer)}
            _write(self.folder / name, json.dumps(content, indent=1))


def machine() -> dict[str, Any]:
    """The part of this machine's fingerprint that decides how fast a kernel is."""
    return {name: value for name, value in _facts(torch.get_num_threads()) if name in _DECISIVE}


@functools.cache
def _facts(threads: int) -> tuple[tuple[str, Any], ...]:
    return tuple(fingerprint().items())


def _digest(question: str) -> str:
    identity = json.dumps([machine(), question], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32] + ".json"


def _read(path: Path, question: str) -> Answer | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["machine"] != machine() or content["question"] != question:
            return None
        answer = content["answer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.debug("no timing in %s: %r", path, error)
        return None
    return answer if isinstance(answer, dict) else None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        draft = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("timing not written to %s: %r", path, error)
