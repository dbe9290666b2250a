"""Recorded results as Markdown: the summary, then a table of systems and one of ratios for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.recorded import IDENTITY, Result, Spread, is_spread, spread_of
from benchmarks.standing import behind, standings


def markdown(results: Sequence[Result]) -> str:
    """The whole of the results, machines included, as GitHub's Markdown."""
    parts = ["# Benchmarks", *_summary(results)]
    for result in results:
        parts += [f"## {result.name}", _facts(result), *_tables(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_text(result: Result) -> str:
    """The fingerprint on one line."""
    return ", ".join(f"{key} {value}" for key, value in result.machine.items() if value is not None)


def machines_text(results: Sequence[Result]) -> str:
    """Whether the results come from one machine; what tells them apart where they don't."""
    machines = {result.identity for result in results}
    if len(machines) == 1:
        return ""
    unlike = [key for i, key in enumerate(IDENTITY) if len({m[i] for m in machines}) > 1]
    return (
        f"Measured on {len(machines)} machines, or with other settings of one: they differ in "
        f"{', '.join(unlike)}. Figures of different results are not to be compared."
    )


def columns(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures that any of the rows has, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows.values() for key in row))


def figure_text(value: Any) -> str:
    """A figure as people read it; `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if is_spread(value):
        return str(spread_of(value))
    if isinstance(value, list):
        return ", ".join(map(figure_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure_text(item)}" for key, item in value.items())
    return str(value)


def milliseconds(time: Spread) -> str:
    """`12.3 ms (11.9 to 13.0)`; in seconds from one second on."""
    unit, scale = ("s", 1e-3) if time.median >= 1000 else ("ms", 1.0)
    median, low, high = (
        f"{scale * part:#.4g}".rstrip(".") for part in (time.median, time.p5, time.p95)
    )
    return f"{median} {unit} ({low} to {high})" if time.varies else f"{median} {unit}"


def simple_facts(result: Result) -> dict[str, Any]:
    """Of what else a file holds, what fits on a line."""
    return {key: value for key, value in result.more.items() if not isinstance(value, Mapping)}


def nested_facts(result: Result) -> dict[str, Mapping[str, Any]]:
    """Of what else a file holds, what doesn't."""
    return {key: value for key, value in result.more.items() if isinstance(value, Mapping)}


def nested_table(value: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a nested fact as text: a row for each of its own mappings, or figure."""
    if not all(isinstance(row, Mapping) for row in value.values()) or all(
        is_spread(row) for row in value.values()
    ):
        return ["", "figure"], [[name, figure_text(figure)] for name, figure in value.items()]
    names = columns(value)
    rows = [[key, *(figure_text(row.get(name)) for name in names)] for key, row in value.items()]
    return ["", *names], rows


def _summary(results: Sequence[Result]) -> Iterator[str]:
    yield machines_text(results)
    found = standings(results)
    if found:
        rows = [
            (s.result, s.ours, milliseconds(s.ours_ms), s.other, milliseconds(s.other_ms), s.ratio)
            for s in found
        ]
        yield "The fastest of ours beside the fastest of the others:"
        head = ("result", "ours", "time", "other", "its time", "ratio")
        yield _table(head, [(*row[:-1], "-" if row[-1] is None else str(row[-1])) for row in rows])
    slower = [
        f"- {b.result}: {b.other} is faster than {b.ours}, which takes {b.ratio} times as long"
        for b in behind(results)
    ]
    if slower:
        yield "Where another system is faster than the fastest of ours:\n\n" + "\n".join(slower)


def _facts(result: Result) -> str:
    facts = [f"{key}: {figure_text(value)}" for key, value in simple_facts(result).items()]
    return "  \n".join([*facts, f"machine: {machine_text(result)}"])


def _tables(result: Result) -> Iterator[str]:
    if result.systems:
        times, others = result.times(), result.others()
        names = columns(others)
        order = [*times, *(name for name in result.systems if name not in times)]
        timed = ("time",) if times else ()
        yield _table(
            ("system", *timed, *names),
            [
                (
                    name,
                    *((milliseconds(times[name]) if name in times else "-",) if times else ()),
                    *(figure_text(others[name].get(column)) for column in names),
                )
                for name in order
            ],
        )
    if result.ratios:
        yield _table(("ratio", "of cost"), [(n, str(r)) for n, r in result.ratios.items()])
    for name, value in nested_facts(result).items():
        if value:
            yield f"{name}:"
            yield _table(*nested_table(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
