"""The plots of the comparison page: quality against a cost, and the roofline."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt.comparison.placing import place
from fxopt.comparison.table import shortened
from fxopt.measurement.ceilings import Ceilings
from fxopt.measurement.roofline import Layer
from fxopt.rendering import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIGA = 1e9
_LETTERS = 11
_BADGE = 9.0
_LABEL_WIDTH, _LONGEST_LABEL = 40, 78
# Roofs nearer to one another than this share a line of text.
_APART = 1.25
# From this span on a linear axis would press the small values together.
_WIDE = 8.0


@dataclass(frozen=True)
class Point:
    """A model in a plot: its number on the page, and its spread along x where it has one.

    An infinite `y`, as of outputs without any error, is drawn above all others.
    """

    number: int
    name: str
    x: float
    y: float
    low: float
    high: float
    on_front: bool
    facts: str


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `better` says which way is better: "higher" or "lower"."""

    label: str
    better: str


def scatter(points: Sequence[Point], x: Axis, y: Axis, key: str) -> str:
    """One `<svg>` of the points, numbered; those on the Pareto front filled and joined."""
    figure = svg.new_figure()
    axes = figure.add_subplot()
    _style(axes, f"{x.label}  ({x.better} is better)", f"{y.label}  ({y.better} is better)")
    shown = _drawn_heights(axes, points)
    _scale(axes, "x", [value for p in points for value in (p.low, p.high)])
    _front(axes, sorted((p.x, h) for p, h in shown if p.on_front), y.better == "higher")
    for point, height in shown:
        if point.high > point.low:
            spread = [point.low, point.high]
            axes.plot(spread, [height] * 2, color=svg.SOFT, linewidth=1, zorder=2)
    titles = _badges(figure, axes, [(p.number, p.x, h, p.on_front, p.facts) for p, h in shown])
    names = "; ".join(f"{p.number} {p.facts}{', on the front' * p.on_front}" for p in points)
    return svg.inline(figure, key, f"{y.label} against {x.label}. {names}", titles)


@dataclass(frozen=True)
class Attained:
    """A whole model in the roofline: operations a byte, and operations a second as measured."""

    number: int
    name: str
    intensity: float
    rate: float


def roofline(
    layers: Sequence[Layer], ceilings: Ceilings, attained: Attained | None, key: str, name: str
) -> str:
    """One `<svg>`: the roof of each dtype, each layer at its bound, the model as measured."""
    figure = svg.new_figure()
    axes = figure.add_subplot()
    _style(axes, "operations a byte", "GFLOP/s")
    dots = [layer for layer in layers if layer.flops and layer.bytes and layer.seconds]
    places = [(layer.intensity, layer.flops / layer.seconds / _GIGA) for layer in dots]
    shown = [*places, (attained.intensity, attained.rate / _GIGA)] if attained else places
    _roofs(axes, ceilings, shown)
    titles = {}
    for index, (layer, (x, rate)) in enumerate(zip(dots, places, strict=True)):
        axes.plot(
            x, rate, "o", markersize=4 + 8 * math.sqrt(layer.share), gid=f"layer{index}",
            color=svg.WAS, alpha=0.75, markeredgecolor=svg.INK, markeredgewidth=0.5, zorder=3,
        )  # fmt: skip
        titles[f"layer{index}"] = layer_facts(layer)
    if attained:
        facts = f"{attained.name}: {attained.rate / 1e12:.3g} TFLOP/s as measured"
        badge = (attained.number, attained.intensity, attained.rate / _GIGA, True, facts)
        titles |= _badges(figure, axes, [badge])
    words = f"Roofline of {name}: {len(dots)} layers under {ceilings}"
    return svg.inline(figure, key, words, titles)


def layer_facts(layer: Layer) -> str:
    """A layer in a line: its path, class, operations, bytes, least time and what binds it."""
    return (
        f"{layer.path or 'the model itself'}{f' ({layer.kind})' if layer.kind else ''}: "
        f"{layer.flops / 1e6:.4g} MFLOP, {layer.bytes / 1e6:.4g} MB, at least "
        f"{1e3 * layer.seconds:.3g} ms by {layer.limit}"
    )


def _style(axes: Axes, x: str, y: str) -> None:
    for text, put in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        lines = textwrap.fill(shortened(text, _LONGEST_LABEL), _LABEL_WIDTH)
        put(lines, color=svg.INK, fontsize=_LETTERS, parse_math=False)
    axes.tick_params(which="both", colors=svg.SOFT, labelsize=_LETTERS - 1, length=3)
    axes.grid(color=svg.LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(svg.SOFT)


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Linear from zero, or logarithmic where the values span a lot; plain numbers on the ticks."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis: Any = getattr(axes, f"{which}axis")
    low, high = min(values), max(values)
    limits: Any = getattr(axes, f"set_{which}lim")
    if low > 0 and high / low > _WIDE:
        getattr(axes, f"set_{which}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
        limits(low / 1.3, high * 1.3)
    else:
        axis.set_major_locator(MaxNLocator(6))
        limits(0.0, 1.12 * high or 1.0)
    axis.set_major_formatter("{x:g}")


def _drawn_heights(axes: Axes, points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Each point with where it stands: what is infinite, above the rest on a tick of its own."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    finite = [p.y for p in points if math.isfinite(p.y)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = (high - low) or abs(high) or 1.0
    top, bottom = high + 0.35 * room, low - 0.35 * room
    ticks = MaxNLocator(5).tick_values(low, high)
    kept = [tick for tick in ticks if low - 0.15 * room <= tick <= high + 0.05 * room]
    names = {}
    if any(p.y == math.inf for p in points):
        names[top] = "exact" if finite or len(points) else ""
    if any(p.y == -math.inf for p in points):
        names[bottom] = "−∞"
    axes.yaxis.set_major_locator(FixedLocator(sorted([*kept, *names])))
    digits = max(0, 1 - math.floor(math.log10(room)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: names.get(value, f"{value:.{digits}f}"))
    )
    margin = 0.15 * room
    drawn = [min(max(p.y, bottom), top) for p in points]
    axes.set_ylim(min(drawn) - margin, max(drawn) + margin)
    return list(zip(points, drawn, strict=True))


def _front(axes: Axes, corners: Sequence[tuple[float, float]], higher: bool) -> None:
    """Steps through the front: what lies on the other side of them is dominated."""
    if not corners:
        return
    end = axes.get_xlim()[1], corners[-1][1]
    x, y = zip(*corners, end, strict=True)
    axes.plot(
        x, y, drawstyle="steps-post", color=svg.ACCENT, linewidth=1.2, linestyle=(0, (5, 3)),
        zorder=1,
    )  # fmt: skip


def _badges(
    figure: Figure, axes: Axes, marks: Sequence[tuple[int, float, float, bool, str]]
) -> dict[str, str]:
    """Points with their numbers; returns the tooltips by identifier."""
    with svg.letters_by_the_browser():
        figure.draw_without_rendering()
    pixels = 72 / figure.dpi
    to_page = axes.transData.transform
    spots = [tuple(to_page((x, y)) * pixels) for _, x, y, _, _ in marks]
    left, bottom, right, top = (side * pixels for side in axes.bbox.extents)
    places = place(spots, _BADGE, (left, bottom, right, top))
    titles = {}
    for (number, x, y, filled, facts), spot, at in zip(marks, spots, places, strict=True):
        offset = (at[0] - spot[0], at[1] - spot[1])
        if offset != (0.0, 0.0):
            axes.plot(x, y, "o", color=svg.ACCENT if filled else svg.SOFT, markersize=4, zorder=4)
        axes.annotate(
            str(number), (x, y), offset, textcoords="offset points", ha="center",
            va="center_baseline", fontsize=_LETTERS, fontweight="bold", gid=f"badge{number}",
            color=svg.SHEET if filled else svg.INK, zorder=6, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": svg.SOFT, "linewidth": 0.8, "shrinkB": 0},
            bbox={
                "boxstyle": "circle,pad=0.25", "linewidth": 1.2,
                "facecolor": svg.ACCENT if filled else svg.SHEET,
                "edgecolor": svg.ACCENT if filled else svg.SOFT,
            },
        )  # fmt: skip
        titles[f"badge{number}"] = facts
    return titles


def _roofs(axes: Axes, ceilings: Ceilings, shown: Sequence[tuple[float, float]]) -> None:
    """The axes, wide enough for `shown`, and the lines that nothing should exceed."""
    bandwidth = ceilings.bandwidth / _GIGA
    rates = sorted((rate / _GIGA, name) for name, rate in ceilings.flops.items())
    slowest, fastest = rates[0][0], rates[-1][0]
    low = min([slowest / bandwidth, *(x for x, _ in shown)]) / 2.5
    high = max([fastest / bandwidth, *(x for x, _ in shown)]) * 5
    bottom = min([bandwidth * low, *(y for _, y in shown)]) / 2
    top = max([fastest, *(y for _, y in shown)]) * 2
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.plot([low, fastest / bandwidth], [bandwidth * low, fastest], color=svg.ACCENT, lw=1.4)
    style: Any = {"textcoords": "offset points", "fontsize": _LETTERS - 1, "color": svg.INK}
    labels: list[tuple[float, str]] = []
    for rate, name in rates:
        axes.plot([rate / bandwidth, high], [rate, rate], color=svg.ACCENT, lw=1.4)
        text = f"{name} {rate:,.0f}" if rate >= 100 else f"{name} {rate:.3g}"
        if labels and rate < _APART * labels[-1][0]:
            text = f"{labels.pop()[1]}, {text}"
        labels.append((rate, text))
    for rate, text in labels:
        axes.annotate(text, (high, rate), (-2, 2), ha="right", **style)
    middle = math.sqrt(low * slowest / bandwidth)
    label = f"memory {ceilings.bandwidth / _GIGA:.3g} GB/s"
    axes.annotate(label, (middle, bandwidth * middle), (7, -4), va="top", **style)
