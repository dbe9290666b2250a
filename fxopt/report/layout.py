"""Where the boxes, operations and wires of a picture go: a layered layout, one box at a time.

Each box is laid out on its own, innermost first. Its parts and the values that enter or leave it
stand in rows, so that data always flows downwards (Sugiyama, Tagawa and Toda, "Methods for visual
understanding of hierarchical system structures", 1981): rows by longest path, a value that passes a
row holds a place in it, order within rows by barycentre, and horizontal places by least squares
under the order. So no wire ever crosses a node, and none leaves a box but through its edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fxopt.report.boxes import Box, Boxes, Op, operations

_CHARACTER = 6.4
_OP_HEIGHT = 22.0
_ROW_GAP = 16.0
_COLUMN_GAP = 10.0
_PADDING = 8.0
_HEADER = 20.0
_SWEEPS = 8


@dataclass
class Placed:
    """An operation or a box with its place in the drawing, in pixels."""

    item: Op | Box
    x: float
    y: float
    width: float
    height: float


@dataclass
class Wire:
    """A value's way from one row of a box to the next."""

    source: Op
    x1: float
    y1: float
    x2: float
    y2: float
    ends: bool


@dataclass
class Drawing:
    """Everything placed; boxes come before what they hold."""

    width: float
    height: float
    placed: list[Placed] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)


@dataclass(eq=False)
class _Cell:
    """What takes a place in a row: an operation, a box, or a passing, entering or leaving value."""

    item: Op | Box | None
    value: Op | None
    width: float
    height: float
    row: int = 0
    x: float = 0.0
    drawing: Drawing | None = None
    entries: dict[Op, float] = field(default_factory=dict)
    exits: dict[Op, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Link:
    source: _Cell
    target: _Cell
    value: Op


def lay_out(boxes: Boxes) -> Drawing:
    """The drawing of the outermost box."""
    return _lay_out_box(boxes.root, boxes.edges)[0]


def _lay_out_box(
    box: Box, edges: Sequence[tuple[Op, Op]]
) -> tuple[Drawing, dict[Op, float], dict[Op, float]]:
    """The drawing of a box and where each value enters it at the top and leaves at the bottom."""
    inside = set(operations(box))
    own = [edge for edge in edges if edge[0] in inside or edge[1] in inside]
    cells, holder = _cells_of(box, own)
    entering = {a: _Cell(None, a, 2.0, 0.0) for a, _ in own if a not in inside}
    leaving = {a: _Cell(None, a, 2.0, 0.0) for a, b in own if b not in inside}
    links: dict[tuple[_Cell, _Cell, Op], _Link] = {}
    for a, b in own:
        source = holder[a] if a in inside else entering[a]
        target = holder[b] if b in inside else leaving[a]
        if source is not target:
            links[source, target, a] = _Link(source, target, a)
    order = [*entering.values(), *cells, *leaving.values()]
    _rank(order, list(links.values()), set(entering.values()), set(leaving.values()))
    rows, hops = _rows_of(order, list(links.values()))
    _order(rows, hops)
    _place(rows, hops)
    return _draw(box, rows, hops, entering, leaving)


def _cells_of(box: Box, edges: Sequence[tuple[Op, Op]]) -> tuple[list[_Cell], dict[Op, _Cell]]:
    cells = []
    holder: dict[Op, _Cell] = {}
    for child in box.children:
        if isinstance(child, Op):
            cell = _Cell(child, None, len(child.label) * _CHARACTER + 16.0, _OP_HEIGHT)
            holder[child] = cell
        else:
            drawing, entries, exits = _lay_out_box(child, edges)
            cell = _Cell(child, None, drawing.width, drawing.height, 0, 0.0, drawing, entries, exits)
            holder.update(dict.fromkeys(operations(child), cell))
        cells.append(cell)
    return cells, holder


def _rank(
    order: Sequence[_Cell], links: Sequence[_Link], first: set[_Cell], last: set[_Cell]
) -> None:
    """Rows by longest path; what nothing feeds stands right above its first user."""
    into: dict[_Cell, list[_Cell]] = {}
    out: dict[_Cell, list[_Cell]] = {}
    position = {cell: index for index, cell in enumerate(order)}
    for link in links:
        if position[link.source] < position[link.target]:
            into.setdefault(link.target, []).append(link.source)
            out.setdefault(link.source, []).append(link.target)
    for cell in order:
        cell.row = max((source.row + 1 for source in into.get(cell, ())), default=0 if cell in first else 1)
    for cell in reversed(order):
        if cell not in first and not into.get(cell) and out.get(cell):
            cell.row = max(min(target.row for target in out[cell]) - 1, 1 if first else 0)
    bottom = max((cell.row for cell in order if cell not in last), default=0) + 1
    for cell in last:
        cell.row = bottom
