"""Recorded results as one self-contained HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from benchmarks.markdown import (
    columns,
    figure_text,
    machine_text,
    machines_text,
    milliseconds,
    nested_facts,
    nested_table,
    simple_facts,
)
from benchmarks.recorded import Result, Spread, pair_of
from benchmarks.standing import behind, is_ours, outcome, standings

_STYLES = (files("fxopt.report").joinpath("style.css"), Path(__file__).with_suffix(".css"))


def page(results: Sequence[Result]) -> str:
    """The page; every name and text is escaped, and a policy forbids all loading."""
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in _STYLES)
    sections = [_header(results), _standings(results), *map(_section, results)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt benchmarks</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(results: Sequence[Result]) -> str:
    links = "".join(
        f'<a href="#{escape(result.name)}">{escape(result.name)}</a>' for result in results
    )
    alarm = machines_text(results)
    return (
        '<header><p class="soft">fxopt</p><h1>Benchmarks</h1>'
        '<p class="soft">Systems of one result were timed in turns in one process. A ratio is '
        "taken round by round: below 1, the first costs less. Spreads are 5th to 95th "
        "percentiles.</p>"
        + (f'<p class="alarm">{escape(alarm)}</p>' if alarm else "")
        + f"<nav>{links}</nav></header>"
    )


def _standings(results: Sequence[Result]) -> str:
    found = standings(results)
    if not found:
        return ""
    head = ("result", "ours", "time", "other", "its time", "ratio")
    rows = []
    for s in found:
        ratio = "not taken" if s.ratio is None else str(s.ratio)
        style = "soft" if s.ratio is None else outcome(s.ratio)
        cells = (s.result, s.ours, milliseconds(s.ours_ms), s.other, milliseconds(s.other_ms))
        rows.append([*map(escape, cells), f'<span class="{style}">{escape(ratio)}</span>'])
    slower = "".join(
        f"<li>{escape(b.result)}: <b>{escape(b.other)}</b> is faster than {escape(b.ours)}, which "
        f'takes <span class="bad">{escape(str(b.ratio))}</span> times as long</li>'
        for b in behind(results)
    )
    listed = (
        "<h3>Where another system is faster than the fastest of ours</h3>"
        f'<ul class="behind">{slower}</ul>'
        if slower
        else ""
    )
    return (
        "<section><h2>The fastest of ours beside the fastest of the others</h2>"
        f"{_table(head, rows)}{listed}</section>"
    )


def _section(result: Result) -> str:
    facts = "; ".join(f"{key} {figure_text(value)}" for key, value in simple_facts(result).items())
    parts = [_times(result), _ratios(result)]
    beside = "".join(part for part in parts if part)
    return (
        f'<section id="{escape(result.name)}"><h2>{escape(result.name)}</h2>'
        f'<p class="soft">{escape(facts)}</p>'
        + (f'<div class="two">{beside}</div>' if beside else "")
        + _others(result)
        + "".join(_nested(key, value) for key, value in nested_facts(result).items())
        + f'<p class="soft">Machine: {escape(machine_text(result))}</p></section>'
    )


def _times(result: Result) -> str:
    times = result.times()
    top = max((time.p95 for time in times.values()), default=0.0)
    if not top:
        return ""
    rows = []
    for name, time in times.items():
        fill = f'<div class="fill" style="width:{100 * time.median / top:.1f}%"></div>'
        kind = "row" if is_ours(name) else "row other"
        rows.append(_row(kind, name, milliseconds(time), fill + _whisker(time, 0.0, top)))
    return f'<div class="bars"><h3>Time, the fastest first</h3>{"".join(rows)}</div>'


def _ratios(result: Result) -> str:
    """Dots with whiskers on a logarithmic scale that all ratios of the result share."""
    shown = {name: ratio for name, ratio in result.ratios.items() if ratio.p5 > 0}
    if not shown:
        return ""
    low = math.log(min(0.9, *(ratio.p5 for ratio in shown.values())))
    high = math.log(max(1.1, *(ratio.p95 for ratio in shown.values())))
    rows = []
    for first, group in itertools.groupby(shown.items(), key=lambda item: _halves(item[0])[0]):
        rows.append(f"<h4>{escape(first)}, over that of</h4>" if first else "")
        for name, ratio in group:
            logs = Spread(*(math.log(part) for part in (ratio.median, ratio.p5, ratio.p95)))
            marks = (
                f'<div class="one-line" style="left:{_place(0.0, low, high):.1f}%"></div>'
                + _whisker(logs, low, high)
                + f'<div class="dot {outcome(ratio)}" '
                f'style="left:{_place(logs.median, low, high):.1f}%"></div>'
            )
            rows.append(_row("row", _halves(name)[1], str(ratio), marks))
    return (
        '<div class="bars"><h3>Cost, round by round</h3><p class="soft">The line is 1; left of it '
        f"the first costs less. Logarithmic scale.</p>{''.join(rows)}</div>"
    )


def _halves(name: str) -> tuple[str, str]:
    """What stands before and after the stroke; a name without one has nothing before it."""
    return pair_of(name) or ("", name)


def _row(kind: str, name: str, figure: str, marks: str) -> str:
    return (
        f'<div class="{kind}"><div class="name"><span>{escape(name)}</span>'
        f'<span>{escape(figure)}</span></div><div class="track">{marks}</div></div>'
    )


def _whisker(spread: Spread, low: float, high: float) -> str:
    if not spread.varies:
        return ""
    left, right = _place(spread.p5, low, high), _place(spread.p95, low, high)
    return f'<div class="spread" style="left:{left:.1f}%;width:{right - left:.1f}%"></div>'


def _place(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)


def _others(result: Result) -> str:
    others = {name: row for name, row in result.others().items() if row}
    return _rows_table("system", others) if others else ""


def _nested(key: str, value: Mapping[str, Any]) -> str:
    if not value:
        return ""
    head, rows = nested_table(value)
    table = _table(head, [[*map(escape, row)] for row in rows])
    return f'<details class="pass"><summary>{escape(key)}</summary>{table}</details>'


def _rows_table(corner: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    names = columns(rows)
    cells = [
        [escape(name), *(escape(figure_text(row.get(column))) for column in names)]
        for name, row in rows.items()
    ]
    return _table((corner, *names), cells)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(_cells(head, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cells(head: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    for name, cell in zip(head, row, strict=True):
        yield f'<td data-name="{escape(name)}"><span>{cell}</span></td>'
