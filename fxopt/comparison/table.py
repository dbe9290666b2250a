"""The comparison as one plain table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from fxopt.comparison.fields import ComparisonFields, Row
from fxopt.comparison.missing import gaps, of_whom
from fxopt.measurement.energy import Energy
from fxopt.measurement.forcing import Decoded
from fxopt.measurement.generation import Generation
from fxopt.rendering.alignment import aligned
from fxopt.rendering.units import duration, size

_LONGEST_NAME = 22
_LONGEST_IN_LIST = 40
_WIDTH = 100
COSTS = {"latency": "latency", "energy": "energy", "memory": "parameters"}
"""What the costs of a front are called in texts."""


def render(comparison: ComparisonFields) -> str:
    """A row a model, its number first and `*` where it is on the front of latency."""
    names = columns(comparison)
    rows = [("", "model", *names)]
    front = comparison.front()
    for row in comparison.rows:
        mark = f"{'*' if row.name in front else ' '}{row.number}"
        cells = cell_texts(comparison, row)
        rows.append((mark, shortened(row.name, _LONGEST_NAME), *(cells[name] for name in names)))
    lines = aligned(rows, "<<>")
    lines.insert(1, "-" * len(max(lines, key=len)))
    return "\n".join([*lines, "", *_below(comparison)])


def columns(comparison: ComparisonFields) -> tuple[str, ...]:
    """The names of the columns behind the model's that hold something for any model."""
    cells = [cell_texts(comparison, row) for row in comparison.rows]
    return tuple(name for name in cells[0] if any(each[name] for each in cells))


def cell_texts(comparison: ComparisonFields, row: Row) -> dict[str, str]:
    """{column: text} of a model, empty where there is no figure."""
    found, worth = row.measurement, row.fidelity
    quality = comparison.quality
    energy = found.energy
    joules = f"{_mark(energy)}{energy.joules.median:.3g} J" if isinstance(energy, Energy) else ""
    cells = {
        "latency": duration(found.latency.median),
        "time / reference": (
            "the reference" if row.name == comparison.reference
            else f"{row.ratio.median:.2f} ({row.ratio.p5:.2f} to {row.ratio.p95:.2f})"
        ),
        "parameters": "" if found.parameter_bytes is None else size(found.parameter_bytes),
        "peak": "" if found.peak_bytes is None else size(found.peak_bytes),
        "energy": joules,
        **_writing_texts(comparison, found.generation),
        "SQNR": "" if worth is None else decibels_text(worth.sqnr_db),
        **_decoded_texts(None if worth is None else worth.decoded),
    }  # fmt: skip
    if not quality.unit:  # SQNR, which has one, is there already
        value = quality.values.get(row.name)
        name = f"{quality.name} (metric)" if quality.name in cells else quality.name
        cells[name] = "" if value is None else figure_text(value)
    return cells


def _writing_texts(comparison: ComparisonFields, found: Generation | None) -> dict[str, str]:
    """What writing text costs, in columns that all models have."""
    written = [one for row in comparison.rows if (one := row.measurement.generation) is not None]
    contexts = [one.context for one in written[0].decoding] if written else []
    rates = {} if found is None else {o.context: o.tokens_per_second for o in found.decoding}
    steps = {
        f"tokens/s behind {one}": f"{rates[one]:.3g}" if one in rates else "" for one in contexts
    }
    return {
        "first token": "" if found is None else duration(found.first_token.median),
        **steps,
        "cache/token": "" if found is None else size(round(found.cache_bytes_per_token)),
    }


def _decoded_texts(found: Decoded | None) -> dict[str, str]:
    """What steps are worth."""
    perplexity = None if found is None else found.perplexity
    return {
        "SQNR of steps": "" if found is None else decibels_text(found.sqnr_db),
        "KL of steps": "" if found is None else f"{found.kl:.2g} (most {found.kl_max:.2g})",
        "greedy match": "" if found is None else f"{found.greedy_match:.1%}",
        "perplexity of steps": "" if perplexity is None else figure_text(perplexity.candidate),
    }


def decibels_text(value: float) -> str:
    """`34.2 dB`, or `exact` without any error."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def figure_text(value: float) -> str:
    """Six digits, so that 0.99998 and 1 are two figures."""
    return f"{value:.6g}"


def shortened(name: str, longest: int) -> str:
    """The name in one line, its middle left out where it is too long."""
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    return f"{name[: (longest - 1) // 2]}…{name[-(longest // 2) :]}"


def _mark(energy: Energy) -> str:
    return "~" if energy.estimated else ""


def _below(comparison: ComparisonFields) -> Iterator[str]:
    quality = comparison.quality
    yield f"judged by {quality.name}, {quality.better} is better; * Pareto front of latency"
    for front in comparison.fronts:
        names = ", ".join(shortened(name, _LONGEST_IN_LIST) for name in front.names)
        yield from _wrapped(f"front of {COSTS[front.cost]}: {names}")
    if any(
        isinstance(e := row.measurement.energy, Energy) and e.estimated for row in comparison.rows
    ):
        yield "~ an estimate: no counter was read"
    for gap in gaps(comparison):
        yield from _wrapped(f"not measured: {gap.what} of {of_whom(gap, comparison)}: {gap.reason}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="   ", break_on_hyphens=False)
