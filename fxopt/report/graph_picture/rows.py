"""The parts of one box in rows, so that data flows downwards and wires are short and straight.

Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system structures",
IEEE Trans. SMC 11 (1981): rows by longest path; a value that passes a row holds a place in it;
order within rows by barycentre, the order with the fewest crossings wins; horizontal places by
least squares under that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

from fxopt.report.graph_picture.boxes import Box, Op
from fxopt.report.graph_picture.shapes import Drawing

_COLUMN_GAP = 10.0
_SWEEPS = 12
# How much more a passing value's place counts than a node's.
_STRAIGHT = 3.0


@dataclass(eq=False)
class Cell:
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
class Link:
    source: Cell
    target: Cell
    value: Op


def in_rows(
    cells: Sequence[Cell], links: Sequence[Link], first: set[Cell], last: set[Cell]
) -> tuple[list[list[Cell]], list[Link]]:
    """The rows, cells placed in them, and the links cut into hops from one row to the next.

    `first` are kept in the top row and `last` in the bottom row. Of a cycle, the links that lead
    back are left out.
    """
    order = _sorted(cells, links)
    position = {cell: index for index, cell in enumerate(order)}
    forward = [link for link in links if position[link.source] < position[link.target]]
    _rank(order, forward, first, last)
    rows, hops = _rows_of(order, forward)
    _arrange(rows, hops)
    _place(rows, hops)
    return rows, hops


def _sorted(cells: Sequence[Cell], links: Sequence[Link]) -> list[Cell]:
    """Topological order that keeps the given one where it can; a cycle is cut where it closes."""
    into: dict[Cell, list[Cell]] = {}
    for link in links:
        into.setdefault(link.target, []).append(link.source)
    done: dict[Cell, None] = {}
    seen: set[Cell] = set()
    stack = list(reversed(cells))
    while stack:
        cell = stack[-1]
        waiting = [source for source in into.get(cell, ()) if source not in seen]
        if cell in seen or not waiting:
            done.setdefault(stack.pop())
        seen.add(cell)
        stack += reversed(waiting)
    return list(done)


def _rank(order: Sequence[Cell], links: Sequence[Link], first: set[Cell], last: set[Cell]) -> None:
    """Rows by longest path; what nothing feeds stands right above its first user."""
    into: dict[Cell, list[Cell]] = {}
    out: dict[Cell, list[Cell]] = {}
    for link in links:
        into.setdefault(link.target, []).append(link.source)
        out.setdefault(link.source, []).append(link.target)
    for cell in order:
        sources = into.get(cell)
        cell.row = 1 + max(source.row for source in sources) if sources else int(cell not in first)
    for cell in reversed(order):
        if cell not in first and cell not in into and cell in out:
            cell.row = max(min(target.row for target in out[cell]) - 1, 1)
    bottom = 1 + max((cell.row for cell in order if cell not in last), default=0)
    for cell in last:
        cell.row = bottom


def _rows_of(order: Sequence[Cell], links: Sequence[Link]) -> tuple[list[list[Cell]], list[Link]]:
    """The rows, and the links cut into hops from row to row over places held in between.

    Links of one value share their places, so that it runs down as one wire and branches.
    """
    rows: list[list[Cell]] = [[] for _ in range(1 + max((cell.row for cell in order), default=0))]
    for cell in order:
        rows[cell.row].append(cell)
    passing: dict[tuple[Cell, Op, int], Cell] = {}
    hops: dict[tuple[Cell, Cell, Op], Link] = {}
    for link in links:
        source = link.source
        for row in range(link.source.row + 1, link.target.row):
            key = (link.source, link.value, row)
            if key not in passing:
                passing[key] = Cell(None, link.value, 2.0, 0.0, row)
                rows[row].append(passing[key])
            hops[source, passing[key], link.value] = Link(source, passing[key], link.value)
            source = passing[key]
        hops[source, link.target, link.value] = Link(source, link.target, link.value)
    return rows, list(hops.values())


def _arrange(rows: list[list[Cell]], hops: Sequence[Link]) -> None:
    """Order each row by the mean place of its neighbours, downwards and upwards in turn.

    Where a neighbour is a box, the place within it counts at which it takes or gives the value.
    """
    above: dict[Cell, list[tuple[Cell, float]]] = {}
    below: dict[Cell, list[tuple[Cell, float]]] = {}
    for hop in hops:
        source, target = hop.source, hop.target
        exit_share = source.exits.get(hop.value, 0.0) / source.width
        entry_share = target.entries.get(hop.value, 0.0) / target.width
        above.setdefault(target, []).append((source, exit_share))
        below.setdefault(source, []).append((target, entry_share))
    size = {cell: len(row) for row in rows for cell in row}
    place = {cell: (i + 0.5) / len(row) for row in rows for i, cell in enumerate(row)}
    best, fewest = [list(row) for row in rows], _crossings(hops, place, size)
    for sweep in range(_SWEEPS):
        near = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {
                cell: _mean([place[other] + share / size[other] for other, share in near[cell]])
                if cell in near
                else place[cell]
                for cell in row
            }
            row.sort(key=wanted.__getitem__)
            place.update({cell: (i + 0.5) / len(row) for i, cell in enumerate(row)})
        crossings = _crossings(hops, place, size)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best


def _crossings(hops: Sequence[Link], place: Mapping[Cell, float], size: Mapping[Cell, int]) -> int:
    """How often wires between the same two rows cross in the given order."""
    by_row: dict[int, list[tuple[float, float]]] = {}
    for hop in hops:
        a, b = hop.source, hop.target
        leaves = place[a] + a.exits.get(hop.value, 0.0) / a.width / size[a]
        enters = place[b] + b.entries.get(hop.value, 0.0) / b.width / size[b]
        by_row.setdefault(a.row, []).append((leaves, enters))
    return sum(
        (x1 - y1) * (x2 - y2) < 0
        for wires in by_row.values()
        for (x1, x2), (y1, y2) in combinations(wires, 2)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _place(rows: Sequence[Sequence[Cell]], hops: Sequence[Link]) -> None:
    """Centres of the cells: near where their wires come from and go to, never overlapping."""
    into: dict[Cell, list[Link]] = {}
    out: dict[Cell, list[Link]] = {}
    for hop in hops:
        into.setdefault(hop.target, []).append(hop)
        out.setdefault(hop.source, []).append(hop)
    for row in rows:
        _spread(row, [0.0] * len(row))
    for sweep in range(_SWEEPS + 1):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            wanted = [_wanted(cell, into.get(cell, []), out.get(cell, []), down) for cell in row]
            _spread(row, wanted)


def _wanted(cell: Cell, into: Sequence[Link], out: Sequence[Link], down: bool) -> float:
    """Where a cell's wires on the side that the sweep comes from would be straight.

    One side at a time, so that one sweep straightens a wire over any number of rows.
    """
    from_above = [exit_of(hop) - entry_of(hop) for hop in into]
    from_below = [entry_of(hop) - exit_of(hop) for hop in out]
    pulls = (from_above or from_below) if down else (from_below or from_above)
    return cell.x + _mean(pulls) if pulls else cell.x


def _spread(row: Sequence[Cell], wanted: Sequence[float]) -> None:
    """The places nearest to `wanted` (least squares) that keep the order and the distances.

    With the distances taken off this is isotonic regression, by pooling adjacent violators.
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + _COLUMN_GAP)
    pools: list[tuple[float, float, int]] = []
    for cell, want, offset in zip(row, wanted, offsets, strict=False):
        mean, weight, count = want - offset, 1.0 if cell.item else _STRAIGHT, 1
        while pools and pools[-1][0] > mean:
            other, heavy, more = pools.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + more
        pools.append((mean, weight, count))
    places = [mean for mean, _, count in pools for _ in range(count)]
    for cell, place, offset in zip(row, places, offsets, strict=False):
        cell.x = place + offset


def exit_of(hop: Link) -> float:
    cell = hop.source
    return cell.x + cell.exits.get(hop.value, 0.0)


def entry_of(hop: Link) -> float:
    cell = hop.target
    return cell.x + cell.entries.get(hop.value, 0.0)
