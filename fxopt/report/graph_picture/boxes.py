"""Nested boxes: the modules of a picture, and the operations in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fxopt.report.graph_picture.picture import PictureNode

# The operations that cost: matrix products, convolutions, attention, table look-ups.
_HEAVY = ("linear", "addmm", "matmul", "mm", "bmm", "conv", "attention", "embedding", "einsum")


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


def operations(box: Box) -> Iterator[Op]:
    """Every operation inside a box."""
    for child in box.children:
        if isinstance(child, Op):
            yield child
        else:
            yield from operations(child)
