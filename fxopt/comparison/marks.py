"""Pieces of the page that several of its sections show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from fxopt.comparison.fields import Row


def number(row: Row, on_front: bool) -> str:
    """A model's number as in the plots, filled on the front."""
    return f'<b class="number{" front" * on_front}">{row.number}</b>'


def amounts(title: str, values: Sequence[tuple[Row, int | None, Callable[[int], str]]]) -> str:
    """A bar a model; one without a value says so."""
    top = max((value for _, value, _ in values if value is not None), default=0) or 1
    bars = "".join(
        amount(
            f'<b class="number">{row.number}</b>{escape(row.name)}',
            "not measured" if value is None else text(value),
            0.0 if value is None else value / top,
        )
        for row, value, text in values
    )
    return f'<div class="panel amounts"><h3>{escape(title)}</h3>{bars}</div>'


def amount(name: str, text: str, share: float, style: str = "fill") -> str:
    """One bar of `share` of the full width under its `name` (HTML) and `text`."""
    return (
        f'<div class="amount"><div><span>{name}</span><span>{escape(text)}</span></div>'
        f'<div class="track"><div class="fill {style}" style="width:{100 * share:.1f}%"></div>'
        "</div></div>"
    )
