"""The section of the page that goes layer by layer: bars of least times, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fxopt.comparison import plots
from fxopt.comparison.fields import Row
from fxopt.comparison.marks import amount
from fxopt.measurement.roofline import Layer
from fxopt.rendering.units import duration

_MOST_LAYERS = 14

_INTRODUCTION = (
    '<p class="soft">The least time of each layer under this machine\'s measured ceilings, as if '
    "nothing were fused; times of single layers are not measured. In the roofline a dot is a layer "
    "at its bound, larger where it weighs more; the number is the whole model as measured.</p>"
    '<p class="legend"><span><i class="bound"></i>bound by arithmetic</span>'
    '<span><i class="other"></i>bound by memory</span><span><i class="dot"></i>a layer</span></p>'
)


def layer_section(rows: Sequence[Row]) -> str:
    """A block for each model whose operations were counted, the first of them open."""
    known = [row for row in rows if row.measurement.layers]
    if not known:
        return ""
    blocks = "".join(_block(row, is_open=index == 0) for index, row in enumerate(known))
    return f"<h2>Layer by layer</h2>{_INTRODUCTION}{blocks}"


def _block(row: Row, is_open: bool) -> str:
    found = row.measurement
    bound = "" if found.bound_ms is None else f"at least {duration(found.bound_ms)} unfused, "
    facts = f"{bound}{duration(found.latency.median)} measured"
    layers = sorted(found.layers, key=lambda layer: -layer.seconds)
    return (
        f'<details class="pass"{" open" * is_open}><summary><b class="number">{row.number}</b>'
        f'<b>{escape(row.name)}</b> <span class="soft">{escape(facts)}</span></summary>'
        f'<div class="two">{_bars(layers)}{_roofline(row)}</div></details>'
    )


def _bars(layers: Sequence[Layer]) -> str:
    shown, rest = layers[:_MOST_LAYERS], layers[_MOST_LAYERS:]
    top = max((layer.seconds for layer in shown), default=0.0) or 1.0
    bars = "".join(
        f'<div title="{escape(plots.layer_facts(layer))}">'
        + amount(
            escape(layer.path or "the model itself").replace(".", ".<wbr>"),
            f"{duration(1e3 * layer.seconds)}, {layer.limit}",
            layer.seconds / top,
            "" if layer.limit == "compute" else "other",
        )
        + "</div>"
        for layer in shown
    )
    seconds = sum(layer.seconds for layer in rest)
    more = (
        f'<p class="soft">{len(rest)} more layers, {duration(1e3 * seconds)} in all.</p>'
        if rest
        else ""
    )
    return f'<div class="amounts"><h3>Least time by layer</h3>{bars}{more}</div>'


def _roofline(row: Row) -> str:
    found = row.measurement
    if found.ceilings is None:
        return ""
    attained = None
    if found.flops and found.bytes_moved:
        rate = found.flops / (found.latency.median / 1e3)
        attained = plots.Attained(row.number, row.name, found.flops / found.bytes_moved, rate)
    drawn = plots.roofline(
        found.layers, found.ceilings, attained, f"roofline{row.number}", row.name
    )
    without = sum(not layer.flops for layer in found.layers)
    note = (
        f'<p class="soft">{without} layers without products are not in it.</p>' if without else ""
    )
    return f'<div class="panel"><h3>Roofline</h3>{drawn}{note}</div>'
