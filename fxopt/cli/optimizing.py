"""`fxopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.destinations import check_file, check_folder
from fxopt.cli.options import (
    DEFAULT_PASSES,
    AsJson,
    Batch,
    Calibration,
    Device,
    Length,
    Model,
    Passes,
)
from fxopt.cli.preparing import load, texts
from fxopt.cli.progress import steps
from fxopt.errors import SaveError
from fxopt.optimized import Optimized
from fxopt.progress import Progress
from fxopt.transform import transform


def optimize(
    model: Model = None,
    passes: Passes = DEFAULT_PASSES,
    out: Annotated[
        Path | None, typer.Option(help="Folder to save the optimised program in.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="File for the report: .html, .json or .txt.")
    ] = None,
    on_violation: Annotated[
        str, typer.Option(help="raise or revert when a claim fails.")
    ] = "raise",
    calibration: Calibration = None,
    batch: Batch = 8,
    length: Length = 64,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Transform a model, print what was done, claimed and measured, and save the result."""
    check_folder(out, "--out")
    check_file(report, "--report")
    with steps() as say:
        loaded = load(model, batch, length, device, say)
        optimized = transform(
            loaded.model,
            passes,
            example_inputs=loaded.inputs,
            calibration=texts(loaded, calibration, length),
            on_violation=on_violation,  # type: ignore[arg-type]
            progress=say,
        )
        failed = _save(optimized, out, report, say)
    typer.echo(optimized.report.to_json() if as_json else str(optimized.report))
    for what, path in (("program", out), ("report", report)):
        if path is not None and what not in failed and not as_json:
            typer.echo(f"{what} saved to {path}")
    for error in failed.values():
        raise error


def _save(
    optimized: Optimized, out: Path | None, report: Path | None, say: Progress
) -> dict[str, SaveError]:
    """Write what was asked for; why something couldn't be, after the report was printed."""
    failed = {}
    if out is not None:
        say(f"saving to {out}")
        try:
            optimized.save(out)
        except SaveError as error:
            failed["program"] = error
    if report is not None:
        try:
            optimized.report.save(report)
        except SaveError as error:
            failed["report"] = error
    return failed
