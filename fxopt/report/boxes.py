"""From a flat picture to nested boxes: modules, with layers of equal structure collapsed into one.

Three things keep a deep model readable: chains of operations that only move or view data become one
node, a module that holds one operation lends it its name instead of a frame, and neighbours in a
numbered list (`encoder.layer.0` to `.11`) that hold the same operations, joined the same way, are
drawn once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx

from fxopt.report.picture import GraphPicture, PictureNode

_VIEWS = {
    *("alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape"),
    *("select", "slice", "squeeze", "t", "to", "transpose", "unflatten", "unsqueeze", "view"),
    *("_to_copy", "_unsafe_view"),
}
# The operations that cost: matrix products, convolutions, attention, table look-ups.
_HEAVY = ("linear", "addmm", "matmul", "mm", "bmm", "conv", "attention", "embedding", "einsum")
# A graph of no more operations than this is drawn whole; in a larger one small ones are folded.
_LARGE = 40
# A module without submodules, costly or changed operations becomes one node from this many on.
_SMALL = 5
# A module's own operations beside its submodules get a box of their own from this many on.
_OWN_GROUP = 6
_OWN = "own operations"


@dataclass(eq=False)
class Op:
    """One drawn operation: one node, a folded chain or a folded small module, in graph order.

    `owner` is the name of the module that has lent it, for a module of one operation; `summary` is
    the label of a folded module.
    """

    nodes: list[PictureNode]
    owner: str = ""
    summary: str = ""

    @property
    def label(self) -> str:
        """What the node says: `query · linear`, `view · transpose`, `unsqueeze ×3`."""
        if self.summary:
            return f"{self.owner}.{self.summary}" if self.owner else self.summary
        counts = Counter(node.op.strip("_") for node in self.nodes)
        names = [name if times == 1 else f"{name} ×{times}" for name, times in counts.items()]
        text = " · ".join(names[:2]) + (" …" if len(names) > 2 else "")
        return f"{self.owner} · {text}" if self.owner else text

    @property
    def kind(self) -> str:
        """Input, op or output."""
        return self.nodes[-1].kind

    @property
    def is_heavy(self) -> bool:
        """Whether it does the costly work of a model."""
        return any(word in node.op for node in self.nodes for word in _HEAVY)

    @property
    def is_small(self) -> bool:
        """Whether a reader can do without it: neither costly nor changed, nor input or output."""
        return self.kind == "op" and not (self.is_heavy or self.changed)

    @property
    def changed(self) -> bool:
        """Whether a step made it."""
        return any(node.changed for node in self.nodes)


@dataclass(eq=False)
class Box:
    """A module: what it holds in topological order, drawn once for `times` equal neighbours.

    `title` is the path below the enclosing box; `last` the number of the last of the neighbours.
    """

    path: str
    title: str
    kind: str
    children: list[Op | Box] = field(default_factory=list)
    times: int = 1
    last: str = ""


@dataclass(frozen=True)
class Boxes:
    """The tree of boxes and the data flow between its operations (each pair once)."""

    root: Box
    edges: list[tuple[Op, Op]]


def build(picture: GraphPicture) -> Boxes:
    """The nested boxes of a picture."""
    ops = _fold_chains(picture.nodes)
    made_by = {node.name: op for op in ops for node in op.nodes}
    root = _grow_tree(picture, ops, made_by)
    if len(ops) > _LARGE:
        _group_own(root, made_by)
    copies = _Copies()
    _collapse(root, made_by, copies)
    folded: dict[Op, Op] = {}
    if len(ops) > _LARGE:
        _fold_small(root, folded)
    _simplify(root)
    edges = {}
    for op in ops:
        for name in (name for node in op.nodes for name in node.inputs if name in made_by):
            ends = copies.original(made_by[name], op)
            if ends is not None:
                source, target = (folded.get(end, end) for end in ends)
                edges[source, target] = source is not target
    return Boxes(root, [ends for ends, distinct in edges.items() if distinct])


def operations(box: Box) -> Iterator[Op]:
    """Every operation inside a box."""
    for child in box.children:
        if isinstance(child, Op):
            yield child
        else:
            yield from operations(child)


def _fold_chains(nodes: Sequence[PictureNode]) -> list[Op]:
    users = Counter(name for node in nodes for name in node.inputs)
    ending: dict[str, Op] = {}
    ops = []
    for node in nodes:
        before = ending.get(node.inputs[0]) if len(node.inputs) == 1 else None
        last = before.nodes[-1] if before else None
        if (
            before
            and last
            and users[last.name] == 1
            and {node.op, last.op} <= _VIEWS
            and (node.module, node.changed) == (last.module, last.changed)
        ):
            before.nodes.append(node)
            ending[node.name] = before
        else:
            ops.append(Op([node]))
            ending[node.name] = ops[-1]
    return ops


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


def _group_own(box: Box, made_by: Mapping[str, Op]) -> None:
    """Put larger groups of a module's own small operations (a mask, rotary positions) in a box.

    Only groups that joining can't make feed themselves through a submodule.
    """
    flow = networkx.DiGraph()
    holder: dict[Op, Op | Box] = {}
    for child in box.children:
        flow.add_node(child)
        if isinstance(child, Box):
            _group_own(child, made_by)
            holder.update(dict.fromkeys(operations(child), child))
        else:
            holder[child] = child
    for op, target in holder.items():
        for name in (name for node in op.nodes for name in node.inputs if name in made_by):
            source = holder.get(made_by[name], target)
            if source is not target:
                flow.add_edge(source, target)
    own = [child for child in box.children if isinstance(child, Op) and child.is_small]
    if len(own) == len(box.children):
        return
    for members in networkx.weakly_connected_components(flow.subgraph(own)):
        if len(members) >= _OWN_GROUP and not _feeds_itself(flow, members):
            group = Box(box.path, _OWN, "", [op for op in own if op in members])
            box.children[box.children.index(group.children[0])] = group
            box.children = [child for child in box.children if child not in members]


def _feeds_itself(flow: networkx.DiGraph, members: set[Op]) -> bool:
    after = set().union(*(networkx.descendants(flow, op) for op in members)) - members
    before = set().union(*(networkx.ancestors(flow, op) for op in members)) - members
    return bool(after & before)


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


def _fold_small(box: Box, folded: dict[Op, Op]) -> None:
    for index, child in enumerate(box.children):
        if not isinstance(child, Box):
            continue
        ops = [inner for inner in child.children if isinstance(inner, Op)]
        plain = all(op.is_small for op in ops) and child.times == 1
        nodes = [node for op in ops for node in op.nodes]
        if plain and len(ops) == len(child.children) and len(nodes) >= _SMALL:
            summary = f"{child.title} · {child.kind or f'{len(nodes)} operations'}"
            one = Op(nodes, summary=summary if child.title != _OWN else f"{len(nodes)} operations")
            folded.update(dict.fromkeys(ops, one))
            box.children[index] = one
        else:
            _fold_small(child, folded)


def _simplify(box: Box) -> None:
    """A box of one operation lends it its name; a box of one box becomes one with it."""
    for index, child in enumerate(box.children):
        if not isinstance(child, Box):
            continue
        _simplify(child)
        if len(child.children) != 1:
            continue
        only = child.children[0]
        if isinstance(only, Op) and child.times == 1:
            only.owner = f"{child.title}.{only.owner}" if only.owner else child.title
            box.children[index] = only
        elif isinstance(only, Box) and child.times == 1:
            only.title = f"{child.title}.{only.title}"
            only.kind = only.kind or child.kind
            box.children[index] = only
