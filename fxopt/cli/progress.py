"""Progress on the standard error, and what Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from fxopt.progress import Progress

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""


@contextmanager
def steps() -> Iterator[Progress]:
    """A progress line with the time of the step at hand, on the standard error.

    A Ctrl-C that nobody inside has made use of leaves with the exit code 130.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task: list[Any] = []

            def step(line: str) -> None:
                if task:
                    bar.update(task[-1], total=1, completed=1)
                task.append(bar.add_task(escape(line), total=None))

            yield step
            if task:
                bar.update(task[-1], total=1, completed=1)
    except KeyboardInterrupt:
        leave("nothing was measured")


@contextmanager
def stop_on_request(say: Progress) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C raises nothing but makes the callable true; the second raises."""
    asked: list[int] = []

    def note(signum: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        say("Ctrl-C: finishing with what is measured; press it again to leave at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def leave(kept: str) -> None:
    """Exit as interrupted; `kept` says what became of the work."""
    typer.echo(f"interrupted: {kept}", err=True)
    raise typer.Exit(INTERRUPTED)
