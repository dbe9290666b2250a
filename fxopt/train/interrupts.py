"""Ctrl-C between two steps, not within one: a half-made step would leave no usable weights."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """Whether an interrupt came that is still to be raised."""

    requested: bool = False


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """The first SIGINT sets `requested`, the next raises KeyboardInterrupt where it finds the code.

    In a thread other than the main one, where Python raises none, nothing is changed.
    """
    found = Interrupts()
    previous = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or previous in (None, signal.SIG_IGN):
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        if found.requested:
            raise KeyboardInterrupt
        found.requested = True

    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, previous)
