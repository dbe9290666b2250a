"""What a reader can do without, folded into single nodes that still tell what they stand for.

Chains of operations that only move or view data become one node; so do, in a large graph, modules
and groups of small operations of which nothing has changed. A module that holds one operation lends
it its name instead of a frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fxopt.report.graph_picture.boxes import Box, Op, operations
from fxopt.report.graph_picture.picture import PictureNode

if TYPE_CHECKING:
    import networkx

_VIEWS = {
    *("alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape"),
    *("select", "slice", "squeeze", "t", "to", "transpose", "unflatten", "unsqueeze", "view"),
    *("_to_copy", "_unsafe_view"),
}
# A module without submodules, costly or changed operations becomes one node from this many on.
_SMALL = 5
# A module's own operations beside its submodules get a box of their own from this many on.
_OWN_GROUP = 6
_OWN = "own operations"


def fold_chains(nodes: Sequence[PictureNode]) -> list[Op]:
    """Operations in topological order; a chain that only moves or views data is one of them."""
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


def group_own(box: Box, made_by: Mapping[str, Op]) -> None:
    """Put larger groups of a module's own small operations (a mask, rotary positions) in a box.

    Only groups that joining can't make feed themselves through a submodule.
    """
    import networkx

    flow = networkx.DiGraph()
    holder: dict[Op, Op | Box] = {}
    for child in box.children:
        flow.add_node(child)
        if isinstance(child, Box):
            group_own(child, made_by)
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
    import networkx

    after = set().union(*(networkx.descendants(flow, op) for op in members)) - members
    before = set().union(*(networkx.ancestors(flow, op) for op in members)) - members
    return bool(after & before)


def fold_small(box: Box, folded: dict[Op, Op]) -> None:
    """Make one node of each box of small operations only; `folded` learns what became what."""
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
            fold_small(child, folded)


def simplify(box: Box) -> None:
    """A box of one operation lends it its name; a box of one box becomes one with it."""
    for index, child in enumerate(box.children):
        if not isinstance(child, Box):
            continue
        simplify(child)
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
