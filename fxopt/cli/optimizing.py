"""`fxopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from fxopt.transform import transform

REPORT_SUFFIXES = (".html", ".json", ".txt")


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
    check_suffix(report, "--report")
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
        if out is not None:
            say(f"saving to {out}")
            optimized.save(out)
        if report is not None:
            optimized.report.save(report)
    if as_json:
        typer.echo(optimized.report.to_json())
        return
    typer.echo(str(optimized.report))
    for what, path in (("program", out), ("report", report)):
        if path is not None:
            typer.echo(f"{what} saved to {path}")


def check_suffix(path: Path | None, option: str) -> None:
    """Refuse, before any work is done, a file that couldn't be written by its suffix."""
    if path is not None and path.suffix.lower() not in REPORT_SUFFIXES:
        raise typer.BadParameter(
            f"end {path.name!r} in {', '.join(REPORT_SUFFIXES)}", param_hint=f"'{option}'"
        )
