"""`fxopt bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxopt.cli.options import (
    AsJson,
    Batch,
    Calibration,
    Device,
    Energy,
    Length,
    Model,
    PassLists,
    Repeats,
    Watts,
)
from fxopt.cli.preparing import load, named_lists, prepare, texts
from fxopt.cli.progress import leave, steps
from fxopt.cli.rounds import Rounds, measure_rounds
from fxopt.measurement import Energy as Joules
from fxopt.timing import fingerprint, ratio

_ORIGINAL = "eager"


def bench(
    model: Model = None,
    passes: PassLists = None,
    repeats: Repeats = 20,
    energy: Energy = True,
    watts: Watts = None,
    calibration: Calibration = None,
    batch: Batch = 8,
    length: Length = 128,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time the original beside one or more pass lists, in turns, in one run; joules where counted.

    Ctrl-C prints what was measured until then, and exits with 130.
    """
    lists = named_lists(passes, _ORIGINAL)
    with steps() as say:
        loaded = load(model, batch, length, device, say)
        prepared = prepare(loaded, lists, texts(loaded, calibration, length), say)
        systems = {
            name: _call(one, loaded.inputs)
            for name, one in {_ORIGINAL: loaded.model, **prepared.models}.items()
        }
        place = next(iter(loaded.inputs.values())).device
        taken = measure_rounds(systems, place, repeats=repeats, energy=energy, watts=watts, say=say)
    interrupted = prepared.interrupted or taken.interrupted
    if taken.times:
        rows = [_row(name, taken) for name in taken.times]
        no_joules = next((str(e) for e in taken.energy.values() if not isinstance(e, Joules)), None)
        document = {
            "model": loaded.origin,
            "machine": fingerprint(),
            "rows": rows,
            "energy": no_joules,
            "interrupted": interrupted,
        }
        if as_json:
            typer.echo(json.dumps(document, indent=2))
        else:
            Console().print(_table(document, batch))
    if interrupted:
        kept = f"kept {sum(1 for _ in taken.times)} of {len(lists) + 1} systems"
        leave(kept if taken.times else "nothing was measured")


def _row(name: str, taken: Rounds) -> dict[str, Any]:
    latency, spent = taken.times[name], taken.energy[name]
    row = {
        "system": name,
        "median_ms": latency.median,
        "p5_ms": latency.p5,
        "p95_ms": latency.p95,
        "rounds": latency.runs,
        "ratio_to_eager": ratio(latency, taken.times[_ORIGINAL]).median,
    }
    if isinstance(spent, Joules):
        row["joules"] = {
            "median": spent.joules.median,
            "p5": spent.joules.p5,
            "p95": spent.joules.p95,
            "source": spent.source,
            "estimated": spent.estimated,
        }
    return row


def _table(document: Mapping[str, Any], batch: int) -> Table:
    has_joules = any("joules" in row for row in document["rows"])
    table = Table(title=escape(f"{document['model']}, batch {batch}"))
    joules = (_joules_heading(document["rows"]),) if has_joules else ()
    for column in ("system", "median ms", "p5", "p95", "ratio to eager", *joules):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in document["rows"]:
        figures = [f"{row[key]:.2f}" for key in ("median_ms", "p5_ms", "p95_ms", "ratio_to_eager")]
        if has_joules:
            spent = row.get("joules")
            figures.append("-" if spent is None else f"{spent['median']:.3g}")
        table.add_row(escape(str(row["system"])), *figures)
    if document["energy"] is not None:
        table.caption = escape(f"energy {document['energy']}")
    return table


def _joules_heading(rows: list[dict[str, Any]]) -> str:
    return "J a call, estimated" if rows[0].get("joules", {}).get("estimated") else "J a call"


def _call(model: Any, inputs: Mapping[str, Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(**inputs)

    return call
