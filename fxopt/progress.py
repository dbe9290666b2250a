"""Progress: a line before each step of what takes long, for who asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str], None]


def silent(line: str) -> None:
    """Progress that nobody asked for."""
