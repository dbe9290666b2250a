"""What `fxopt search --metric` understands: a figure of fidelity by name, or a user's function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from fxopt.errors import FxoptError, MeasureError
from fxopt.measurement import Fidelity, fidelity

Direction = Literal["maximize", "minimize"]

NAMES: dict[str, Direction] = {
    "cosine": "maximize",
    "top1": "maximize",
    "perplexity": "minimize",
}
"""The metrics that need no code, and which way is better."""


@dataclass(frozen=True)
class FidelityMetric:
    """`cosine`: mean cosine of the outputs with the original's; `top1`: share of rows whose largest
    entry is the same; `perplexity`: the candidate's own, for causal language models."""

    name: str
    original: nn.Module

    def __call__(self, model: Any, data: Any) -> float:
        found = fidelity(self.original, model, data)
        value = _figure(self.name, found)
        if value is None:
            told = f": {'; '.join(found.notes)}" if found.notes else ""
            raise MeasureError(
                f"--metric {self.name} doesn't apply to the outputs of this model{told}. Use "
                f"another of {', '.join(NAMES)}, or FILE.py:FUNCTION"
            )
        return value


@dataclass(frozen=True)
class FileMetric:
    """A function of a Python file, `function(model, data) -> number`."""

    file: Path
    function: str

    def __call__(self, model: Any, data: Any) -> float:
        found = load_function(self.file, self.function)(model, data)
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise MeasureError(
                f"--metric: {self.function} of {self.file} must return a number: {error}"
            ) from error


def parse_metric(text: str, original: nn.Module) -> tuple[FidelityMetric | FileMetric, Direction]:
    """The metric of a command line's word, and its direction; a function's is "maximize".

    Raises `MeasureError` for an unknown name, a file that can't be run, one without the function.
    """
    if text in NAMES:
        return FidelityMetric(text, original), NAMES[text]
    file, colon, function = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise MeasureError(
            f"unknown metric {text!r}: write {', '.join(NAMES)}, or FILE.py:FUNCTION for a "
            "function of a model and its data that returns a number"
        )
    load_function(Path(file), function)
    return FileMetric(Path(file), function), "maximize"


def load_function(file: Path, name: str) -> Callable[[Any, Any], Any]:
    """The function of that name in a Python file, which is run. Raises `MeasureError`."""
    if not file.is_file():
        raise MeasureError(f"--metric: {file} doesn't exist; give a Python file and its function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FxoptError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise MeasureError(
            f"--metric: running {file} failed with {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise MeasureError(f"--metric: {file} has no function {name!r}")
    return cast("Callable[[Any, Any], Any]", function)


def _figure(name: str, found: Fidelity) -> float | None:
    if name == "cosine":
        return found.cosine_mean
    if name == "top1":
        return found.top1_agreement
    return None if found.perplexity is None else found.perplexity.candidate
