"""Real English text that every machine has: docstrings of Python's standard library.

The files are split in two before anything is read, so that what calibrates and what is judged come
from different modules and share no paragraph.
"""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Tests and vendored copies: hardly any prose, or prose of somewhere else.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"}
_FEWEST_WORDS = 8


def evaluation_texts() -> tuple[str, ...]:
    """Distinct paragraphs to judge with, in an order that mixes the modules; always the same."""
    return _halves()[0]


def calibration_texts() -> tuple[str, ...]:
    """Distinct paragraphs to calibrate with, none of which is an evaluation text."""
    return _halves()[1]


def token_windows(tokenizer: Any, texts: Sequence[str], count: int, length: int) -> list[Tensor]:
    """`count` windows `[1, length]` of token ids that follow one another in the joined texts.

    Raises `ValueError` where the texts are too short for that.
    """
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * length:
            break
        ids += tokenizer(f"{text}\n\n")["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"the texts have {len(ids)} tokens, not {count} windows of {length}")
    rows = torch.tensor(ids[: count * length]).view(count, 1, length)
    return list(rows)


def library_files() -> list[Path]:
    """The files of the standard library that hold prose of its own, in a fixed order."""
    return sorted(
        path
        for path in LIBRARY.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(LIBRARY).parts)
    )


def docstrings_in(path: Path) -> Iterator[str]:
    """The docstrings of a file as they stand in it: of itself, its classes and its functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some files hold invalid escapes on purpose
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            yield docstring


@functools.cache
def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for index, path in enumerate(library_files()):
        for text in _paragraphs(path):
            if text not in seen:
                seen.add(text)
                halves[index % 2].append(text)
    for half in halves:
        random.Random(0).shuffle(half)
    evaluation, calibration = (tuple(half) for half in halves)
    return evaluation, calibration


def _paragraphs(path: Path) -> Iterator[str]:
    for docstring in docstrings_in(path):
        for paragraph in docstring.split("\n\n"):
            text = " ".join(paragraph.split())
            if _is_prose(text):
                yield text


def _is_prose(text: str) -> bool:
    words = text.split()
    plain = sum(word.strip(".,;:()'\"`").isalpha() for word in words)
    return len(words) >= _FEWEST_WORDS and plain >= 0.8 * len(words) and ">>>" not in text
