"""From a flat picture to nested boxes: modules, with layers of equal structure collapsed into one.

Neighbours in a numbered list (`encoder.layer.0` to `.11`) that hold the same operations, joined the
same way, are drawn once; an edge from one of them to the next is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxopt.report.graph_picture.boxes import Box, Boxes, Op, operations
from fxopt.report.graph_picture.folding import fold_chains, fold_small, group_own, simplify
from fxopt.report.graph_picture.picture import GraphPicture

# A graph of no more operations than this is drawn whole; in a larger one small ones are folded.
_LARGE = 40


def build(picture: GraphPicture) -> Boxes:
    """The nested boxes of a picture."""
    ops = fold_chains(picture.nodes)
    made_by = {node.name: op for op in ops for node in op.nodes}
    root = _grow_tree(picture, ops, made_by)
    if len(ops) > _LARGE:
        group_own(root, made_by)
    copies = _Copies()
    _collapse(root, made_by, copies)
    folded: dict[Op, Op] = {}
    if len(ops) > _LARGE:
        fold_small(root, folded)
    simplify(root)
    edges = {}
    for op in ops:
        for name in (name for node in op.nodes for name in node.inputs if name in made_by):
            ends = copies.original(made_by[name], op)
            if ends is not None:
                source, target = (folded.get(end, end) for end in ends)
                edges[source, target] = source is not target
    return Boxes(root, [ends for ends, distinct in edges.items() if distinct])


def _grow_tree(picture: GraphPicture, ops: Sequence[Op], made_by: Mapping[str, Op]) -> Box:
    """Boxes by module path. A module that is called twice, or left and entered again with a result
    of the outside, gets a second box: otherwise data would flow into a box from itself."""
    root = Box("", picture.title, picture.modules.get("", ""))
    open_boxes: dict[str, Box] = {}
    members: dict[Box, int] = {}
    after: dict[Box, int] = {}
    ancestors: dict[Op, int] = {}
    for index, op in enumerate(ops):
        bit = 1 << index
        before = 0
        for name in (name for node in op.nodes for name in node.inputs if name in made_by):
            before |= ancestors[made_by[name]] if made_by[name] is not op else 0
        ancestors[op] = before | bit
        inside = {root}
        parent, path = root, ""
        for part in op.nodes[-1].module.split(".") if op.nodes[-1].module else ():
            path = f"{path}.{part}" if path else part
            box = open_boxes.get(path)
            if box is None or box not in parent.children or before & after[box]:
                box = Box(path, part, picture.modules.get(path, ""))
                open_boxes[path], members[box], after[box] = box, 0, 0
                parent.children.append(box)
            members[box] |= bit
            inside.add(box)
            parent = box
        parent.children.append(op)
        for box, held in members.items():
            if box not in inside and before & held:
                after[box] |= bit
    return root


class _Copies:
    """Which operation stands for which, and which copies of a run an operation belongs to."""

    def __init__(self) -> None:
        self.stands_for: dict[Op, Op] = {}
        self.places: dict[Op, dict[Box, int]] = {}

    def add(self, run: Box, index: int, copy: Sequence[Op], kept: Sequence[Op]) -> None:
        for op, standing in zip(copy, kept, strict=True):
            self.places.setdefault(op, {})[run] = index
            if op is not standing:
                self.stands_for[op] = standing

    def original(self, source: Op, target: Op) -> tuple[Op, Op] | None:
        """The drawn ends of an edge; None where it leads from one copy of a run to another."""
        while True:
            places = self.places.get(target, {})
            for run, index in self.places.get(source, {}).items():
                if places.get(run, index) != index:
                    return None
            ends = self.stands_for.get(source, source), self.stands_for.get(target, target)
            if ends == (source, target):
                return ends
            source, target = ends


def _collapse(box: Box, made_by: Mapping[str, Op], copies: _Copies) -> None:
    kept: list[Op | Box] = []
    shapes: dict[Box, tuple[object, ...]] = {}
    for child in box.children:
        before = kept[-1] if kept else None
        if not isinstance(child, Box) or not child.title.isdigit():
            kept.append(child)
            continue
        shapes[child] = _structure(child, made_by)
        if isinstance(before, Box) and shapes.get(before) == shapes[child]:
            ops = list(operations(before))
            if before.times == 1:
                copies.add(before, 0, ops, ops)
            copies.add(before, before.times, list(operations(child)), ops)
            before.times += 1
            before.last = child.title
        else:
            kept.append(child)
    box.children = kept
    for child in kept:
        if isinstance(child, Box):
            _collapse(child, made_by, copies)


def _structure(box: Box, made_by: Mapping[str, Op]) -> tuple[object, ...]:
    """What two boxes share when they are drawn as one: operations, shapes, and how they join."""
    ops = list(operations(box))
    index = {op: number for number, op in enumerate(ops)}
    rows: list[object] = [box.kind]
    for op in ops:
        for node in op.nodes:
            inner = node.module[len(box.path) :]
            joins = tuple(index.get(made_by[name], -1) for name in node.inputs if name in made_by)
            rows.append((node.op, inner, node.shape, node.changed, joins))
    return tuple(rows)
