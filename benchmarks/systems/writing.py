"""What writes text under comparison: something that continues a prompt greedily, with its times."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Written:
    """Tokens behind a prompt; milliseconds until the first one, and of a later one on average."""

    tokens: tuple[int, ...]
    first_ms: float
    step_ms: float


class Writer(Protocol):
    """A system that is ready to write.

    `weight_bytes` is what it reads for a token, None where that isn't known; `settings` says how it
    is set up, and `logits`, where it has any, gives [T, V] for T tokens.
    """

    weight_bytes: int | None
    settings: str

    def write(self, prompt: Sequence[int], new: int) -> Written:
        """Exactly `new` tokens, at least 2, behind `prompt`, whose cache is made anew."""
        ...


@dataclass(frozen=True)
class Source:
    """The model that all systems write with, and a folder for the files made of it.

    Files that are there already are taken as they are.
    """

    model: Any
    tokenizer: Any
    folder: Path


@dataclass(frozen=True)
class WritingSystem:
    """A name, how to make a writer of the source, and the packages that this takes.

    `slow` ones compile for minutes; they are left out unless they are asked for by name.
    """

    name: str
    prepare: Callable[[Source], Writer]
    needs: tuple[str, ...] = ()
    slow: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that aren't installed here."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)
