"""From the command line's words to models: the one that is loaded, and its pass lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from fxopt.cli.options import DEFAULT_PASSES
from fxopt.errors import FxoptError, PassError
from fxopt.loading import Loaded, TextBatches, load_model
from fxopt.optimized import Optimized
from fxopt.pass_list import resolve_passes
from fxopt.pass_registry import AUTO
from fxopt.progress import Progress
from fxopt.transform import transform

# A name is whatever stands before the first "=", as long as no pass has begun.
_NAMED = re.compile(r"\s*(?P<name>[^{},=]*[^{},=\s])\s*=(?P<passes>.*)", re.DOTALL)


@dataclass
class Prepared:
    """The models of the pass lists by name; why others aren't there; whether Ctrl-C ended it."""

    models: dict[str, Optimized] = field(default_factory=dict)
    failed: dict[str, FxoptError] = field(default_factory=dict)
    interrupted: bool = False


def load(model: str | None, batch: int, length: int, device: str, say: Progress) -> Loaded:
    """The model of the command's argument, with example inputs; its warnings are printed."""
    say(f"loading {model or 'the demo model'}")
    loaded = load_model(model, batch, length, device)
    for warning in loaded.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return loaded


def texts(loaded: Loaded, file: Path | None, length: int) -> TextBatches | None:
    """The batches of a text file; None without a file."""
    return None if file is None else TextBatches(loaded, file, length)


def named_lists(given: Sequence[str] | None, original: str) -> dict[str, str]:
    """Pass lists by name, from `LIST` and `NAME=LIST`; a list without a name is its own.

    Every list is read, so that a wrong one costs no time. Raises `PassError` for that, for two
    lists of one name, and for the name of the `original`.
    """
    lists: dict[str, str] = {}
    for text in given or [DEFAULT_PASSES]:
        match = _NAMED.fullmatch(text)
        name, passes = (match["name"], match["passes"]) if match else (text, text)
        name = name.strip()
        if passes.strip() != AUTO:
            resolve_passes(passes)
        if name in lists:
            raise PassError(f"two pass lists are called {name!r}: name them apart, as NAME=LIST")
        if name == original:
            raise PassError(
                f"{original!r} is what the model is called as it was given: choose another name"
            )
        lists[name] = passes.strip()
    return lists


def prepare(
    loaded: Loaded,
    lists: Mapping[str, str],
    calibration: TextBatches | None,
    say: Progress,
    *,
    keep_failures: bool = False,
) -> Prepared:
    """The model transformed by each list. Ctrl-C ends it, with the lists that are done.

    With `keep_failures`, a list whose transformation raises is told among the `failed`.
    """
    done = Prepared()
    for name, passes in lists.items():
        try:
            done.models[name] = transform(
                loaded.model,
                passes,
                example_inputs=loaded.inputs,
                calibration=calibration,
                measure_cost=False,
                progress=_about(name, say),
            )
        except KeyboardInterrupt:
            say(f"Ctrl-C: going on with the {len(done.models)} lists of {len(lists)} that are done")
            done.interrupted = True
            return done
        except FxoptError as error:
            if not keep_failures:
                raise
            done.failed[name] = error
    return done


def _about(name: str, say: Progress) -> Progress:
    return lambda line: say(f"{name}: {line}")
