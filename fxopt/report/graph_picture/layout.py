"""Where the boxes, operations and wires of a picture go: a layered layout, one box at a time.

Each box is laid out on its own, innermost first; values enter it at the top and leave it at the
bottom. So no wire ever crosses a node, and none leaves a box but through its edge.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.report.graph_picture.boxes import Box, Boxes, Op, operations
from fxopt.report.graph_picture.rows import Cell, Link, entry_of, exit_of, in_rows
from fxopt.report.graph_picture.shapes import Drawing, Placed, Wire

_CHARACTER = 6.4
_OP_HEIGHT = 22.0
_ROW_GAP = 16.0
_PADDING = 8.0
_HEADER = 20.0


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
    entering = {a: Cell(None, a, 2.0, 0.0) for a, _ in own if a not in inside}
    leaving = {a: Cell(None, a, 2.0, 0.0) for a, b in own if b not in inside}
    links: dict[tuple[Cell, Cell, Op], Link] = {}
    for a, b in own:
        source = holder[a] if a in inside else entering[a]
        target = holder[b] if b in inside else leaving[a]
        if source is not target:
            links[source, target, a] = Link(source, target, a)
    rows, hops = in_rows(
        [*entering.values(), *cells, *leaving.values()],
        list(links.values()),
        first=set(entering.values()),
        last=set(leaving.values()),
    )
    return _draw(box, rows, hops)


def _cells_of(box: Box, edges: Sequence[tuple[Op, Op]]) -> tuple[list[Cell], dict[Op, Cell]]:
    cells = []
    holder: dict[Op, Cell] = {}
    for child in box.children:
        if isinstance(child, Op):
            cell = Cell(child, None, len(child.label) * _CHARACTER + 16.0, _OP_HEIGHT)
            holder[child] = cell
        else:
            drawing, entries, exits = _lay_out_box(child, edges)
            cell = Cell(child, None, drawing.width, drawing.height, 0, 0.0, drawing, entries, exits)
            holder.update(dict.fromkeys(operations(child), cell))
        cells.append(cell)
    return cells, holder


def _draw(
    box: Box, rows: Sequence[Sequence[Cell]], hops: Sequence[Link]
) -> tuple[Drawing, dict[Op, float], dict[Op, float]]:
    """Absolute places within the box; entries and exits are counted from the box's middle."""
    cells = [cell for row in rows for cell in row]
    left = min((cell.x - cell.width / 2 for cell in cells), default=0.0) - _PADDING
    right = max((cell.x + cell.width / 2 for cell in cells), default=0.0) + _PADDING
    width = max(right - left, len(heading(box)) * _CHARACTER + 2 * _PADDING)
    shift = (width - (right - left)) / 2 - left
    tops, y = [], _HEADER
    for index, row in enumerate(rows):
        tops.append(y)
        y += max((cell.height for cell in row), default=0.0)
        y += _ROW_GAP if row and index + 1 < len(rows) else 0.0
    height = y + _PADDING * bool(rows and not any(c.value for c in rows[-1]))
    drawing = Drawing(width, height, [Placed(box, 0.0, 0.0, width, height)])
    for cell in cells:
        _draw_cell(cell, drawing, cell.x + shift, tops[cell.row])
    for hop in hops:
        _draw_hop(hop, drawing, shift, tops, rows)
    for cell in rows[0] if rows else ():
        if cell.value:
            x = cell.x + shift
            drawing.wires.append(Wire(cell.value, x, 0.0, x, _HEADER, False))
    middle = width / 2
    inputs = {c.value: c.x + shift - middle for c in rows[0] if c.value} if rows else {}
    outputs = {c.value: c.x + shift - middle for c in rows[-1] if c.value} if rows else {}
    return drawing, inputs, outputs


def _draw_cell(cell: Cell, drawing: Drawing, x: float, y: float) -> None:
    left = x - cell.width / 2
    if cell.drawing:
        for placed in cell.drawing.placed:
            drawing.placed.append(
                Placed(placed.item, placed.x + left, placed.y + y, placed.width, placed.height)
            )
        for w in cell.drawing.wires:
            drawing.wires.append(
                Wire(w.source, w.x1 + left, w.y1 + y, w.x2 + left, w.y2 + y, w.ends)
            )
    elif cell.item:
        drawing.placed.append(Placed(cell.item, left, y, cell.width, cell.height))


def _draw_hop(
    hop: Link,
    drawing: Drawing,
    shift: float,
    tops: Sequence[float],
    rows: Sequence[Sequence[Cell]],
) -> None:
    """A straight piece down to the end of the source's row, then the curve to the next row."""
    x1, x2 = exit_of(hop) + shift, entry_of(hop) + shift
    row = hop.source.row
    start = tops[row] + hop.source.height
    end = tops[row] + max((cell.height for cell in rows[row]), default=0.0)
    if end > start:
        drawing.wires.append(Wire(hop.value, x1, start, x1, end, False))
    ends = isinstance(hop.target.item, Op)
    drawing.wires.append(Wire(hop.value, x1, end, x2, tops[hop.target.row], ends))


def heading(box: Box) -> str:
    """What stands at the top of a box: `layer.0 to 11 (BertLayer) × 12`."""
    text = f"{box.title} to {box.last}" if box.times > 1 else box.title
    text += f" ({box.kind})" if box.kind and box.kind != box.title else ""
    return f"{text} × {box.times}" if box.times > 1 else text
