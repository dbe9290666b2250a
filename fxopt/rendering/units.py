"""Figures as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes in decimal units with three digits: `438 MB`, `1.24 GB`, `512 B`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1000
    return f"{_three_digits(value)} TB"


def duration(milliseconds: float, like: float | None = None) -> str:
    """Milliseconds with three digits, in seconds from one second on: `12.3 ms`, `1.06 s`.

    With `like`, the bare figure in the unit that `like` would have.
    """
    in_seconds = abs(milliseconds if like is None else like) >= 999.5
    figure = _three_digits(milliseconds / 1000 if in_seconds else milliseconds)
    return figure if like is not None else f"{figure} {'s' if in_seconds else 'ms'}"


def span(before: str, after: str) -> str:
    """`438 MB -> 181 MB`, or only one of them when nothing changed."""
    return before if before == after else f"{before} -> {after}"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"
