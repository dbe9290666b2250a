"""A laid-out picture as inline SVG; colours come from the page's style sheet by class."""

from __future__ import annotations

from html import escape

from fxopt.report.graph_picture.boxes import Box, Op
from fxopt.report.graph_picture.layout import heading, lay_out
from fxopt.report.graph_picture.nesting import build
from fxopt.report.graph_picture.picture import GraphPicture
from fxopt.report.graph_picture.shapes import Drawing, Placed, Wire

# On a narrow page the picture shrinks to this share of its size; then it scrolls.
_SMALLEST = 0.75


def draw(picture: GraphPicture) -> tuple[str, int]:
    """One `<svg>` of the picture, with the width in pixels below which it scrolls."""
    drawing = lay_out(build(picture))
    body = [*map(_box, _placed(drawing, Box)), *map(_wire, drawing.wires)]
    body += [*map(_heading, _placed(drawing, Box)), *map(_op, _placed(drawing, Op))]
    width, height = round(drawing.width) + 2, round(drawing.height) + 2
    smallest = round(width * _SMALLEST)
    svg = (
        f'<svg class="graph" role="img" aria-label="{escape(picture.title)}" '
        f'style="width:{width}px;min-width:{smallest}px" '
        f'viewBox="-1 -1 {width} {height}">{"".join(body)}</svg>'
    )
    return svg, smallest


def _placed(drawing: Drawing, kind: type) -> list[Placed]:
    return [placed for placed in drawing.placed if isinstance(placed.item, kind)]


def _box(placed: Placed) -> str:
    box = placed.item
    assert isinstance(box, Box)
    title = escape(f"{box.path or box.title} ({box.kind})" if box.kind else box.path or box.title)
    return f'<g class="box{_times(box)}"><title>{title}</title>{_rect(placed, 6)}</g>'


def _heading(placed: Placed) -> str:
    """Above the wires, which pass behind it."""
    box = placed.item
    assert isinstance(box, Box)
    return (
        f'<text class="heading{_times(box)}" x="{placed.x + 8:.0f}" y="{placed.y + 14:.0f}">'
        f"{escape(heading(box))}</text>"
    )


def _times(box: Box) -> str:
    return " times" if box.times > 1 else ""


def _op(placed: Placed) -> str:
    op = placed.item
    assert isinstance(op, Op)
    style = "io" if op.kind != "op" else "heavy" if op.is_heavy else "light"
    style += " changed" if op.changed else " folded" if op.summary else ""
    middle, base = placed.x + placed.width / 2, placed.y + placed.height / 2 + 4
    return (
        f'<g class="op {style}"><title>{escape(_facts(op))}</title>'
        f"{_rect(placed, 11 if op.kind != 'op' else 4)}"
        f'<text x="{middle:.0f}" y="{base:.0f}">{escape(op.label)}</text></g>'
    )


def _rect(placed: Placed, radius: int) -> str:
    return (
        f'<rect x="{placed.x:.0f}" y="{placed.y:.0f}" width="{placed.width:.0f}" '
        f'height="{placed.height:.0f}" rx="{radius}"/>'
    )


def _wire(wire: Wire) -> str:
    x1, y1, x2, y2 = wire.x1, wire.y1, wire.x2, wire.y2
    middle = (y1 + y2) / 2
    way = (
        f"V{y2:.0f}"
        if abs(x1 - x2) < 0.5
        else f"C{x1:.1f} {middle:.0f} {x2:.1f} {middle:.0f} {x2:.1f} {y2:.0f}"
    )
    tip = f"M{x2 - 3:.1f} {y2 - 5:.0f}l3 5l3 -5" if wire.ends else ""
    node = wire.source.nodes[-1]
    title = f"<title>{escape(f'{node.name}: {node.shape}')}</title>"
    return f'<path class="wire" d="M{x1:.1f} {y1:.0f}{way}{tip}">{title}</path>'


def _facts(op: Op) -> str:
    """The tooltip: every node of the operation with its value, weights and source line."""
    lines = []
    for node in op.nodes:
        lines.append(f"{node.name} = {node.op} → {node.shape}" if node.shape else node.name)
        lines += [f"  reads {weight}" for weight in node.weights]
    last = op.nodes[-1]
    lines += [f"in {last.module}"] if last.module else []
    lines += [last.source] if last.source else []
    return "\n".join(lines)
