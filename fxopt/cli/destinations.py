"""Where a command is to write, tried before it works: what it makes must not be lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from fxopt.errors import SaveError
from fxopt.saving import check_target

SUFFIXES = (".html", ".json", ".txt")


def check_file(path: Path | None, option: str) -> None:
    """Refuse a file whose suffix says no format, or that can't be written where it is to be."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(
            f"end {path.name!r} in {', '.join(SUFFIXES)}", param_hint=f"'{option}'"
        )
    try:
        if path.exists():
            path.open("a", encoding="utf-8").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SaveError(
            f"{option} {path} can't be written: {error.strerror}. Give a file in a folder that "
            "exists and can be written."
        ) from error


def check_folder(path: Path | None, option: str) -> None:
    """Refuse a folder that holds something other than a saved program, or can't be written."""
    if path is None:
        return
    try:
        check_target(path)
    except SaveError as error:
        raise SaveError(f"{option}: {error}") from error
