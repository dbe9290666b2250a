"""A sensitivity as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from fxopt.analyses.sensitivity.effect import Effect
from fxopt.claim import Sqnr
from fxopt.rendering.alignment import aligned

_BAR = 20
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_LONGEST_NAME = 60
# Pixels: a row, a character of the small font, the two plots, what lies between columns.
_ROW, _CHARACTER, _BARS, _DOTS, _GAP, _HEAD = 18, 6.2, 200, 260, 16, 40
_ACCENT, _WARNING = "var(--accent, #2457c5)", "var(--bad, #c0271b)"


def table(rows: Sequence[Effect], runs: int, most: int | None = None) -> tuple[str, ...]:
    """Aligned lines: a headline, a head, and a row a candidate, the costliest first."""
    if not rows:
        return ("sensitivity: no candidates",)
    shown = rows if most is None else rows[:most]
    cells = [("rewritten", "alone", "with those below", "noise", "")]
    cells += [
        (
            _short(row.name),
            _db(row.alone_db),
            _db(row.cumulative_db),
            f"{100 * row.share:.1f} %",
            _bar(row.share, rows[0].share),
        )
        for row in shown
    ]
    lines = [
        f"sensitivity of the outputs to {len(rows)} candidates, signal over noise, in {runs} runs",
        *(f"  {line}" for line in aligned(cells, "<>>><")),
    ]
    rest = rows[len(shown) :]
    if rest:
        share = 100 * sum(row.share for row in rest)
        lines.append(f"  and {len(rest)} more, {share:.1f} % of the noise in all")
    return tuple(lines)


def draw(effects: Sequence[Effect], budget: Sqnr | None, most: int) -> str:
    """One `<svg>`: names, bars of noise shares, dots of cumulative decibels, a line at `budget`."""
    rows = effects[:most]
    left = max((len(_short(row.name)) for row in rows), default=0) * _CHARACTER + _GAP
    dots = left + _BARS + 4 * _GAP
    width, height = dots + _DOTS + 4 * _GAP, _HEAD + _ROW * max(len(rows), 1) + _GAP
    body = [
        _text(left, _HEAD - 14, "share of the noise"),
        _text(dots, _HEAD - 14, "dB left when this row and those below are rewritten"),
        *_bars(rows, left),
        *_dots(rows, dots, budget),
    ]
    hidden = len(effects) - len(rows)
    title = f"Sensitivity of {len(effects)} layers" + (
        f", the {len(rows)} costliest" if hidden else ""
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sensitivity" role="img" '
        f'aria-label="{title}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="currentColor">'
        f"<title>{title}</title>{''.join(body)}</svg>"
    )


def _bars(rows: Sequence[Effect], left: float) -> Iterator[str]:
    largest = max((row.share for row in rows), default=0.0) or 1.0
    for index, row in enumerate(rows):
        y, length = _HEAD + _ROW * index, _BARS * row.share / largest
        facts = f"{row.name}: {_db(row.alone_db)} alone, {100 * row.share:.1f} % of the noise"
        yield (
            f"<g><title>{escape(facts)}</title>"
            f"{_text(left - 8, y + 12, _short(row.name), 'end')}"
            f'<rect x="{left:.1f}" y="{y + 3}" width="{max(length, 0.5):.1f}" '
            f'height="{_ROW - 6}" rx="2" fill="{_ACCENT}"/>'
            f"{_text(left + length + 5, y + 12, _db(row.alone_db))}</g>"
        )


def _dots(rows: Sequence[Effect], left: float, budget: Sqnr | None) -> Iterator[str]:
    levels = [row.cumulative_db for row in rows]
    finite = [level for level in levels if level is not None and math.isfinite(level)]
    known = finite + ([budget.db] if budget else [])
    low, high = min(known, default=0.0), max(known, default=0.0)

    def place(level: float) -> float:
        return left + _DOTS * (min(max(level, low), high) - low) / ((high - low) or 1.0)

    bottom = _HEAD + _ROW * len(rows)
    if budget:
        x = place(budget.db)
        yield (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD - 6}" y2="{bottom}" '
            f'stroke="{_WARNING}" stroke-dasharray="4 3"/>'
            f"{_text(x, bottom + 12, f'budget {budget.db:g} dB', 'middle')}"
        )
    for index, level in enumerate(levels):
        if level is None:
            continue
        x, y = place(level), _HEAD + _ROW * index + _ROW // 2
        broken = budget is not None and level < budget.db
        yield f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{_WARNING if broken else _ACCENT}"/>'
        yield _text(left + _DOTS + 12, y + 3, _db(level))


def _text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def _db(level: float | None) -> str:
    return "-" if level is None else "exact" if level == math.inf else f"{level:.1f} dB"


def _bar(share: float, largest: float) -> str:
    eighths = round(8 * _BAR * share / largest) if largest else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]


def _short(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 2 - 1]}…{name[-_LONGEST_NAME // 2 :]}"
