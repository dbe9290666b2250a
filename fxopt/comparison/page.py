"""The comparison as one self-contained HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from fxopt.comparison import plots
from fxopt.comparison.fields import ComparisonFields, Front, Row
from fxopt.comparison.layer_section import layer_section
from fxopt.comparison.marks import amounts, number
from fxopt.comparison.missing import gaps, of_whom
from fxopt.comparison.table import COSTS, cell_texts, columns, decibels_text, figure_text, shortened
from fxopt.measurement.energy import Energy
from fxopt.measurement.fidelity import Fidelity
from fxopt.rendering.units import duration, size

_UNITS = {"latency": (1.0, "ms"), "energy": (1.0, "J"), "memory": (1e-6, "MB")}
_FINGERPRINT_NAMES = {"isa": "instructions", "load": "load when done"}


def render(comparison: ComparisonFields) -> str:
    """The page; every name is escaped, and a policy forbids all loading.

    Raises `SaveError` where matplotlib isn't installed.
    """
    style = "\n".join(
        files(room).joinpath("style.css").read_text(encoding="utf-8")
        for room in ("fxopt.report", "fxopt.comparison")
    )
    names = ", ".join(row.name for row in comparison.rows)
    sections = [
        _header(comparison),
        _fronts(comparison),
        _costs_table(comparison),
        _fidelity_table(comparison),
        _memory(comparison),
        layer_section(comparison.rows),
        _gaps(comparison),
        _machine(comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt comparison: {escape(names)}</title>"
        f"<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(comparison: ComparisonFields) -> str:
    quality = comparison.quality
    compared = f"{len(comparison.rows)} models, held against {comparison.reference}"
    alarms = "".join(
        f'<p class="alarm">{escape(failure.name)} failed: {escape(failure.reason)}</p>'
        for failure in comparison.failures
    )
    front = comparison.front()
    words = (
        f"Judged by {quality.name} ({quality.better} is better). On the Pareto front of latency: "
        f"{', '.join(shortened(name, 40) for name in front) or 'none'}. No model is both faster "
        "and better than one of these."
    )
    return (
        f'<header><p class="soft">fxopt comparison</p><h1>{escape(compared)}</h1>'
        f"<p>{escape(words)}</p>{alarms}</header>"
    )


def _fronts(comparison: ComparisonFields) -> str:
    panels = [_front_panel(comparison, front) for front in comparison.fronts]
    known = {front.cost for front in comparison.fronts}
    absent = [
        f'<div class="panel"><h3>{escape(_title(comparison, cost))}</h3>'
        f'<p class="soft">No plot: {escape(_why_not(comparison, cost))}</p></div>'
        for cost in COSTS
        if cost not in known
    ]
    legend = (
        '<p class="legend"><span><b class="number front">1</b>on the Pareto front, which the '
        'dashed steps join</span><span><b class="number">2</b>another is cheaper and better</span>'
        "<span>Lines across a point: 5th to 95th percentile</span></p>"
    )
    return (
        f"<h2>What quality costs</h2>{legend}{_names(comparison)}"
        f'<div class="two" style="margin-top:14px">{"".join([*panels, *absent])}</div>'
    )


def _title(comparison: ComparisonFields, cost: str) -> str:
    return f"{comparison.quality.name} against {COSTS[cost]}"


def _why_not(comparison: ComparisonFields, cost: str) -> str:
    reasons = [gap.reason for gap in gaps(comparison) if COSTS[cost] in gap.what]
    return reasons[0] if reasons else "no model has a figure for both"


def _front_panel(comparison: ComparisonFields, front: Front) -> str:
    quality = comparison.quality
    points = [point for row in comparison.rows if (point := _point(comparison, front, row))]
    unit = _UNITS[front.cost][1]
    estimated = front.cost == "energy" and any(
        isinstance(e := row.measurement.energy, Energy) and e.estimated for row in comparison.rows
    )
    x = f"{COSTS[front.cost]}, {unit}{' (ESTIMATED, no counter was read)' * estimated}"
    y = f"{quality.name}{f', {quality.unit}' if quality.unit else ''}"
    drawn = plots.scatter(points, plots.Axis(x, "lower"), plots.Axis(y, quality.better), front.cost)
    left_out = len(comparison.rows) - len(points)
    note = f'<p class="soft">{left_out} without a figure.</p>' if left_out else ""
    return (
        f'<div class="panel"><h3>{escape(_title(comparison, front.cost))}</h3>{drawn}{note}</div>'
    )


def _point(comparison: ComparisonFields, front: Front, row: Row) -> plots.Point | None:
    cost, value = row.cost(front.cost), comparison.quality.values.get(row.name)
    if cost is None or value is None or value != value:
        return None
    factor, unit = _UNITS[front.cost]
    low = high = cost
    energy = row.measurement.energy
    if front.cost == "latency":
        low, high = row.measurement.latency.p5, row.measurement.latency.p95
    elif front.cost == "energy" and isinstance(energy, Energy):
        low, high = energy.joules.p5, energy.joules.p95
    facts = f"{row.name}: {cost * factor:.4g} {unit}, {_quality_text(comparison, value)}"
    on_front = row.name in front.names
    return plots.Point(
        row.number, row.name, cost * factor, value, low * factor, high * factor, on_front, facts
    )


def _quality_text(comparison: ComparisonFields, value: float) -> str:
    quality = comparison.quality
    text = decibels_text(value) if quality.unit == "dB" else figure_text(value)
    return f"{quality.name} {text}"


def _names(comparison: ComparisonFields) -> str:
    front = comparison.front()
    items = "".join(
        f"<li>{number(row, row.name in front)}<span>{escape(row.name)}</span></li>"
        for row in comparison.rows
    )
    return f'<ul class="names">{items}</ul>'


def _costs_table(comparison: ComparisonFields) -> str:
    names = columns(comparison)
    front = comparison.front()
    body = []
    for row in comparison.rows:
        cells = cell_texts(comparison, row)
        latency = row.measurement.latency
        spread = (
            f"{duration(latency.p5, latency.median)} to {duration(latency.p95, latency.median)}"
        )
        cells["latency"] += f" ({spread} in {latency.runs} rounds)"
        first = f"{number(row, row.name in front)}{escape(row.name)}"
        body.append((first, *(escape(cells[name]) for name in names)))
    return f"<h2>The figures</h2>{_table(('model', *names), body)}" + (
        '<p class="soft">Medians, with the 5th and 95th percentile. Times are taken in rounds in '
        "which the models take turns, and their ratio round by round. Peak: what a call needs "
        "beyond what was held before it.</p>"
    )


def _fidelity_table(comparison: ComparisonFields) -> str:
    judged = [row for row in comparison.rows if row.fidelity is not None]
    if not judged:
        return ""
    figures = [dict(_fidelity_cells(row.fidelity)) for row in judged if row.fidelity]
    every = list(dict.fromkeys(name for each in figures for name in each))
    body = [
        (
            f"{number(row, row.name in comparison.front())}{escape(row.name)}",
            *(escape(each.get(name, "")) for name in every),
        )
        for row, each in zip(judged, figures, strict=True)
    ]
    first = judged[0].fidelity
    seen = f"{first.rows} rows of {first.output} in {first.batches} batches" if first else ""
    return (
        f'<h2>Fidelity</h2><p class="soft">Against {escape(comparison.reference)}, over '
        f"{escape(seen)}.</p>{_table(('model', *every), body)}"
    )


def _fidelity_cells(found: Fidelity) -> Iterator[tuple[str, str]]:
    yield "SQNR", decibels_text(found.sqnr_db)
    shares = {
        "cosine, mean": found.cosine_mean,
        "cosine, least": found.cosine_min,
        "KL, nats": found.kl,
        "top-1 agreement": found.top1_agreement,
    }
    for name, value in shares.items():
        if value is not None:
            yield name, f"{value:.5g}"
    pairs = {"perplexity": found.perplexity, "accuracy": found.accuracy, **found.metrics}
    for name, pair in pairs.items():
        if pair is not None:
            yield name, figure_text(pair.candidate)
    if found.decoded is not None:
        yield from ((f"{name} of steps", text) for name, text in found.decoded.figures())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`rows` are HTML, `head` is text."""
    names = "".join(
        f"<th{' class=figure' if index else ''}>{escape(name)}</th>"
        for index, name in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{" class=figure" if index else ""} data-name="{escape(name)}">{cell or "–"}</td>'
            for index, (name, cell) in enumerate(zip(head, row, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _memory(comparison: ComparisonFields) -> str:
    kinds = {
        "Parameters and buffers": [row.measurement.parameter_bytes for row in comparison.rows],
        "Peak of a call, beyond what was held": [
            row.measurement.peak_bytes for row in comparison.rows
        ],
        "Held on the device": [row.measurement.device_bytes for row in comparison.rows],
    }
    panels = "".join(
        amounts(
            title, [(row, value, size) for row, value in zip(comparison.rows, values, strict=True)]
        )
        for title, values in kinds.items()
        if any(value is not None for value in values)
    )
    resident = max((row.measurement.resident_bytes or 0 for row in comparison.rows), default=0)
    note = (
        f'<p class="soft">The whole process with all models and libraries: {size(resident)} '
        "resident.</p>"
        if resident
        else ""
    )
    return f'<h2>Memory</h2><div class="two">{panels}</div>{note}' if panels else ""


def _gaps(comparison: ComparisonFields) -> str:
    found = gaps(comparison)
    items = "".join(
        f"<li>{escape(gap.what)} of {escape(of_whom(gap, comparison))}: {escape(gap.reason)}</li>"
        for gap in found
    )
    body = f'<ul class="gaps">{items}</ul>' if found else '<p class="soft">Nothing is missing.</p>'
    return f"<h2>What was not measured, and why</h2>{body}"


def _machine(comparison: ComparisonFields) -> str:
    facts = "".join(
        f"<dt>{escape(_FINGERPRINT_NAMES.get(name, name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in comparison.fingerprint.items()
        if value is not None
    )
    return f'<h2>Machine</h2><dl class="machine">{facts}</dl>'
