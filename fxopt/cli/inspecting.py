"""`fxopt inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fxopt.capture import capture
from fxopt.cli.options import AsJson, Batch, Calibration, Device, Length, Model
from fxopt.cli.preparing import load, texts
from fxopt.cli.progress import steps
from fxopt.graph_text import GraphText
from fxopt.transform import transform


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
    with steps() as say:
        loaded = load(model, batch, length, device, say)
        if passes is None:
            say("capturing")
            program = capture(loaded.model, loaded.inputs)
            graph, before = GraphText(program), None
        else:
            optimized = transform(
                loaded.model,
                passes,
                example_inputs=loaded.inputs,
                calibration=texts(loaded, calibration, length),
                measure_cost=False,
                progress=say,
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
