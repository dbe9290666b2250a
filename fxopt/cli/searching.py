"""`fxopt search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.metrics import parse_metric
from fxopt.cli.options import AsJson, Batch, Calibration, Data, Device, Length, Model
from fxopt.cli.preparing import load, texts
from fxopt.cli.progress import leave, steps
from fxopt.search import search as search_passes


def search(
    model: Model = None,
    metric: Annotated[
        str, typer.Option(help="cosine, top1, perplexity, or FILE.py:FUNCTION.")
    ] = "cosine",
    tolerance: Annotated[
        float, typer.Option(help="How much of the metric may be lost against the original.")
    ] = 0.001,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="latency, memory or energy; give it several times.", show_default="latency"
        ),
    ] = None,
    data: Data = None,
    start: Annotated[
        list[str] | None, typer.Option("--passes", "-p", help="A pass list to try first.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the whole study.")] = 30,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Begin no trial after this time.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="File or database URL that keeps the study; a later call goes on."),
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "fxopt",
    workers: Annotated[int, typer.Option(min=1, help="Processes on one storage.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard events.")] = None,
    calibration: Calibration = None,
    batch: Batch = 8,
    length: Length = 64,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Search for the cheapest pass lists that keep a metric; prints lists that can be pasted.

    Ctrl-C ends the search and prints what was found until then, with the exit code 130; with
    --storage a later call goes on from there.
    """
    with steps() as say:
        loaded = load(model, batch, length, device, say)
        judge, direction = parse_metric(metric, loaded.model)
        learned = texts(loaded, calibration, length)
        found = search_passes(
            loaded.model,
            texts(loaded, data, length) or [loaded.inputs],
            metric=judge,
            tolerance=tolerance,
            direction=direction,
            objectives=tuple(objective or ("latency",)),
            inputs=loaded.inputs,
            calibration=learned,
            trials=trials,
            seconds=seconds,
            storage=storage,
            study=study,
            start=tuple(start or ()),
            seed=seed,
            workers=workers,
            progress=say,
            log_dir=log_dir,
        )
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
    if found.interrupted:
        ended = sum(trial.counts for trial in found.trials)
        leave(f"kept {ended} of {trials} trials" + ("" if storage is None else f" in {storage}"))
