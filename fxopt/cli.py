"""The command line: `fxopt optimize | inspect | bench`.

Exit codes: 0 done, 1 a claim failed, 2 bad usage or input. With --json the standard output holds
one JSON document and nothing else; progress goes to the standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fxopt import measure
from fxopt.capture import capture
from fxopt.errors import EquivalenceError, FxoptError
from fxopt.graph_text import GraphText
from fxopt.loading import Loaded, TextBatches, load_model
from fxopt.transform import transform

app = typer.Typer(
    name="fxopt",
    help="Make a PyTorch model cheaper to run, with every step shown to be equivalent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

REPORT_SUFFIXES = (".html", ".json", ".txt")
DEFAULT_PASSES = "canonicalize, fuse-linears, fuse-conv-batch-norm, prepack, lower"

Model = Annotated[
    str | None,
    typer.Argument(help="A local transformers folder or GGUF file; left out: the demo model."),
]
Passes = Annotated[
    str, typer.Option("--passes", "-p", help="Pass list, e.g. 'int8-linear{mode=dynamic}, lower'.")
]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the example inputs.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per row, for text models.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text file, one text a line, from which passes learn ranges."),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to the standard output.")]


@app.command()
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
    if report is not None and report.suffix.lower() not in REPORT_SUFFIXES:
        raise typer.BadParameter(
            f"end {report.name!r} in {', '.join(REPORT_SUFFIXES)}", param_hint="'--report'"
        )
    with _steps() as progress:
        loaded = _load(model, batch, length, device, progress)
        optimized = transform(
            loaded.model,
            passes,
            example_inputs=loaded.inputs,
            calibration=_texts(loaded, calibration, length),
            on_violation=on_violation,  # type: ignore[arg-type]
            progress=progress,
        )
        if out is not None:
            progress(f"saving to {out}")
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


@app.command()
def inspect(
    model: Model = None,
    passes: Annotated[
        str | None, typer.Option("--passes", "-p", help="Show the graph after these passes.")
    ] = None,
    full: Annotated[bool, typer.Option(help="Print repeated layers in full.")] = False,
    diff: Annotated[
        bool, typer.Option(help="With --passes: print only what they changed.")
    ] = False,
    calibration: Calibration = None,
    batch: Batch = 2,
    length: Length = 16,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Print the captured graph of a model, typed and grouped by module."""
    with _steps() as progress:
        loaded = _load(model, batch, length, device, progress)
        if passes is None:
            progress("capturing")
            program = capture(loaded.model, loaded.inputs)
            graph, before = GraphText(program), None
        else:
            optimized = transform(
                loaded.model,
                passes,
                example_inputs=loaded.inputs,
                calibration=_texts(loaded, calibration, length),
                measure_cost=False,
                progress=progress,
            )
            program = optimized.program
            graph, before = optimized.graph, optimized.steps[0].graph
    shown = (
        before.diff(graph)
        if diff and before is not None
        else str(graph)
        if full
        else graph.collapsed()
    )
    if as_json:
        document = {
            "model": program.name,
            "operations": program.node_count(),
            "parameter_bytes": program.parameter_bytes(),
            "inputs": [str(tensor) for tensor in program.signature.tensors],
            "graph": shown,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        typer.echo(shown)


@app.command()
def bench(
    model: Model = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--passes", "-p", help="A pass list to time; give it several times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each system.")] = 20,
    calibration: Calibration = None,
    batch: Batch = 8,
    length: Length = 128,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time the original beside one or more pass lists, interleaved, in one run."""
    with _steps() as progress:
        loaded = _load(model, batch, length, device, progress)
        systems: dict[str, Callable[[], object]] = {"eager": _call(loaded.model, loaded.inputs)}
        for spec in passes or [DEFAULT_PASSES]:
            optimized = transform(
                loaded.model,
                spec,
                example_inputs=loaded.inputs,
                calibration=_texts(loaded, calibration, length),
                measure_cost=False,
                progress=progress,
            )
            systems[spec] = _call(optimized, loaded.inputs)
        progress("timing, interleaved")
        times = measure.latency(systems, repeats=repeats, seconds=60.0)
    rows = [
        {
            "system": name,
            "median_ms": latency.median,
            "p5_ms": latency.p5,
            "p95_ms": latency.p95,
            "ratio_to_eager": measure.ratio(latency, times["eager"]).median,
        }
        for name, latency in times.items()
    ]
    if as_json:
        document = {"model": loaded.origin, "machine": measure.fingerprint(), "rows": rows}
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(title=f"{loaded.origin}, batch {batch}")
    for column in ("system", "median ms", "p5", "p95", "ratio to eager"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("median_ms", "p5_ms", "p95_ms", "ratio_to_eager")]
        table.add_row(str(row["system"]), *figures)
    Console().print(table)


def main() -> None:
    """Run the command line; the console script."""
    try:
        app()
    except EquivalenceError as error:
        typer.echo(f"claim failed: {error}", err=True)
        sys.exit(1)
    except FxoptError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _load(
    model: str | None, batch: int, length: int, device: str, progress: Callable[[str], None]
) -> Loaded:
    progress(f"loading {model or 'the demo model'}")
    return load_model(model, batch, length, device)


def _texts(loaded: Loaded, file: Path | None, length: int) -> TextBatches | None:
    return None if file is None else TextBatches(loaded, file, length)


def _call(model: Any, inputs: Any) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(**inputs)

    return call


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """A progress line with the time of the step at hand, on the standard error."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task: list[Any] = []

        def step(line: str) -> None:
            if task:
                bar.update(task[-1], total=1, completed=1)
            task.append(bar.add_task(line, total=None))

        yield step
        if task:
            bar.update(task[-1], total=1, completed=1)
