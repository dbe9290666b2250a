"""A real labelled task that every machine has: which module of the standard library is this from?

A text is one docstring as it stands in a source file, so that nothing is inherited; its label is
the top-level module of the file. What would give the answer away, or count twice, is taken out: the
names of all modules to choose from, texts that come twice in a module or in two of them.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.text import LIBRARY, docstrings_in, library_files

_FEWEST_WORDS = 6
_HELD_OUT = 0.3
# Pure Python twins of modules in C, and what they are the source of.
_TWINS = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime"}


@dataclass(frozen=True)
class Labelled:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Docstrings:
    """Labels with the examples to train on and those held out, no text in both."""

    labels: tuple[str, ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """Examples of each label: `{"asyncio": {"train": 120, "test": 82}, ...}`."""
        train = Counter(example.label for example in self.train)
        test = Counter(example.label for example in self.test)
        return {
            name: {"train": train[index], "test": test[index]}
            for index, name in enumerate(self.labels)
        }


def labelled_docstrings(classes: int, per_class: int) -> Docstrings:
    """The `classes` modules with the most docstrings, at most `per_class` to train on of each.

    The hash of a text decides whether it is held out (three of ten are, also at most `per_class` of
    a module) and in which order it comes: on one version of Python the result is always the same.
    Raises `ValueError` where the library has fewer modules with two docstrings than `classes`.
    """
    found = _docstrings_by_module()
    ranked = sorted(found, key=lambda module: (-len(found[module]), module))
    labels = tuple(sorted(ranked[:classes]))
    texts = _distinct({label: found[label] for label in labels})
    if len(labels) < classes or min(map(len, texts.values()), default=0) < 2:
        raise ValueError(f"the standard library at {LIBRARY} has no {classes} documented modules")
    train: list[Labelled] = []
    test: list[Labelled] = []
    for index, label in enumerate(labels):
        ordered = sorted(texts[label], key=_hash)
        held_out = [text for text in ordered if _is_held_out(text)]
        kept = [text for text in ordered if not _is_held_out(text)]
        train += [Labelled(text, index) for text in kept[:per_class]]
        test += [Labelled(text, index) for text in held_out[:per_class]]
    return Docstrings(labels, tuple(train), tuple(test))


@functools.cache
def _docstrings_by_module() -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in library_files():
        found[_top_level_module(path)] += _long_enough(docstrings_in(path))
    return found


def _top_level_module(path: Path) -> str:
    name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    return _TWINS.get(name, name)


def _long_enough(docstrings: Iterator[str]) -> Iterator[str]:
    for docstring in docstrings:
        text = " ".join(docstring.split())
        if len(text.split()) >= _FEWEST_WORDS:
            yield text


def _distinct(found: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Without the names of the modules, and without the texts that two modules share."""
    names = re.compile(rf"(?<![a-z0-9])_*(?:{'|'.join(found)})(?![a-z0-9])", re.IGNORECASE)
    stripped = {
        module: dict.fromkeys(_long_enough(names.sub(" ", text) for text in texts))
        for module, texts in found.items()
    }
    owners = Counter(text for texts in stripped.values() for text in texts)
    return {
        module: [text for text in texts if owners[text] == 1] for module, texts in stripped.items()
    }


def _is_held_out(text: str) -> bool:
    return _hash(text)[0] < 256 * _HELD_OUT


def _hash(text: str) -> bytes:
    # Python's own hash differs from process to process.
    return hashlib.sha256(text.encode()).digest()
