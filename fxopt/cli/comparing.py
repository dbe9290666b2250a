"""`fxopt compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fxopt.cli.destinations import check_file
from fxopt.cli.options import (
    AsJson,
    Batch,
    Calibration,
    Data,
    Device,
    Energy,
    Length,
    Model,
    PassLists,
    Repeats,
    Watts,
)
from fxopt.cli.preparing import Prepared, load, named_lists, prepare, texts
from fxopt.cli.progress import leave, steps, stop_on_request
from fxopt.comparison import Comparison, Failure
from fxopt.comparison import compare as compare_models

_ORIGINAL = "original"


def compare(
    model: Model = None,
    passes: PassLists = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the comparison: .html (page), .json or .txt.")
    ] = None,
    data: Data = None,
    repeats: Repeats = 20,
    energy: Energy = True,
    watts: Watts = None,
    calibration: Calibration = None,
    batch: Batch = 8,
    length: Length = 64,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare pass lists with the original in cost and in outputs: one table, one page.

    The first Ctrl-C ends the preparing or the judging, and what is there is printed and saved; the
    exit code is 130 then. A list that can't be applied is told with its reason, and the exit code
    is 1.
    """
    check_file(out, "--out")
    lists = named_lists(passes, _ORIGINAL)
    with steps() as say:
        loaded = load(model, batch, length, device, say)
        judged = texts(loaded, data, length) or [loaded.inputs]
        learned = texts(loaded, calibration, length)
        prepared = prepare(loaded, lists, learned, say, keep_failures=True)
        say("measuring in turns, then judging")
        with stop_on_request(say) as stopped:
            comparison = compare_models(
                {_ORIGINAL: loaded.model, **prepared.models},
                UntilStopped(judged, stopped),
                inputs=loaded.inputs,
                repeats=repeats,
                seconds=60.0,
                energy=energy,
                estimate=watts is not None,
                watts=watts,
            )
            interrupted = prepared.interrupted or stopped()
    comparison = _with_failures(comparison, prepared)
    typer.echo(comparison.to_json() if as_json else str(comparison))
    if out is not None:
        comparison.save(out)
        if not as_json:
            typer.echo(f"comparison saved to {out}")
    if interrupted:
        leave(f"kept {len(comparison.rows)} of {len(lists) + 1} models, judged on what was read")
    if comparison.failures:
        raise typer.Exit(1)


class UntilStopped:
    """Batches that end after the one at hand, at the earliest the first, when `stopped()`."""

    def __init__(self, batches: Iterable[Mapping[str, Any]], stopped: Callable[[], bool]) -> None:
        self.batches, self.stopped = batches, stopped

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            yield batch
            if self.stopped():
                return


def _with_failures(comparison: Comparison, prepared: Prepared) -> Comparison:
    failures = [
        Failure(name, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        for name, error in prepared.failed.items()
    ]
    return replace(comparison, failures=(*comparison.failures, *failures))
