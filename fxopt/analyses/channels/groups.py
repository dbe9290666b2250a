"""Groups of channels: which axes of which parameters leave together, and who sums over them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import pointwise, products, views
from fxopt.analyses.channels.dims import Dim
from fxopt.analyses.channels.walk import (
    Axes,
    Handler,
    Read,
    ReaderKind,
    Walk,
    unfollowed,
)
from fxopt.nodes import arguments, label, module_path
from fxopt.program import Program, Refusal
from fxopt.rendering.alignment import aligned

GroupKind = Literal["ffn", "heads", "queries", "head_dim", "residual", "channels"]

_HANDLERS: Mapping[Any, Handler] = {**pointwise.HANDLERS, **views.HANDLERS, **products.HANDLERS}


_SHOWN = 4
"""Places of a group that the table shows."""


@dataclass(frozen=True)
class Place:
    """Where a group's channels stand: along `axis` of the value of `node`.

    `positions` int64 [size, width]: row c holds the indices along the axis that channel c takes;
    an attention head takes as many as it has dimensions.
    """

    node: fx.Node
    axis: int
    positions: Tensor

    @property
    def name(self) -> str:
        """The state's name, for a place in a parameter or buffer."""
        return str(self.node.target)


@dataclass(frozen=True)
class Reader:
    """A node that sums over a group's channels.

    `kind` says how: against a constant weight, as a product with another activation, in a norm's
    statistics, in a mean or a plain sum. `operand` is the activation that is read; `weight` is what
    meets it, the weight's axis or that of the other activation.
    """

    node: fx.Node
    kind: ReaderKind
    operand: Place
    weight: Place | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that leave together or not at all: `size` of them, in all of `places`.

    `kind` tells what they are: hidden channels of a feed-forward network, attention heads (with
    grouped queries: key/value heads, each with its queries), the queries of every such head, the
    dimensions inside a head, channels of a residual stream, or (of a convolution) plain channels.
    `places` are the axes of all parameters and buffers concerned, `refusals` the reasons why no
    channel can be cut; there are none where they can.
    """

    name: str
    kind: GroupKind
    size: int
    places: tuple[Place, ...]
    readers: tuple[Reader, ...]
    refusals: tuple[Refusal, ...]
    dim: Dim = field(repr=False, compare=False)

    @property
    def producers(self) -> tuple[Place, ...]:
        """The places that no reader's weight is."""
        read = {
            (reader.weight.node.target, reader.weight.axis)
            for reader in self.readers
            if reader.weight is not None and reader.kind == "weight"
        }
        return tuple(one for one in self.places if (one.node.target, one.axis) not in read)

    def __str__(self) -> str:
        places = ", ".join(f"{one.name}[{one.axis}]" for one in self.places)
        text = f"{self.name}: {self.size} {self.kind} in {places}"
        return text + (f"; can't be cut: {self.refusals[0]}" if self.refusals else "")


@dataclass(frozen=True)
class Channels:
    """All groups of channels of one program, in the order of their parameters."""

    groups: tuple[Group, ...]
    walk: Walk = field(repr=False, compare=False)

    @property
    def cuttable(self) -> tuple[Group, ...]:
        """The groups whose channels can be cut."""
        return tuple(group for group in self.groups if not group.refusals)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups)
        raise KeyError(f"no group of channels is called {name!r}; there are {known}")

    def __str__(self) -> str:
        if not self.groups:
            return "no parameter has channels that could be cut"
        rows = [("group", "kind", "channels", "where")]
        for group in self.groups:
            rows.append((group.name, group.kind, f"{group.size:,}", _where(group)))
        return "\n".join(aligned(rows, "<<><"))


def _where(group: Group) -> str:
    """The first places, named from the module that holds all of them; or why it can't be cut."""
    if group.refusals:
        return f"can't be cut: {group.refusals[0]}"
    path = _common([one.name.split(".")[:-1] for one in group.places])
    places = [f"{one.name.removeprefix(path + '.')}[{one.axis}]" for one in group.places]
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return f"{path + ': ' if path else ''}{', '.join(places[:_SHOWN])}{more}"


def channels(program: Program) -> Channels:
    """Which axes of the program's parameters are the same channels.

    One walk over the graph: every axis of every value gets a dim (see `dims`), operators unify,
    split and pin dims by a table, and what is unified in the end is one group. An operator that
    isn't in the table pins everything it touches, with its name as the reason.
    """
    walk = Walk(program)
    for node in program.graph.nodes:
        _visit(walk, node)
    return Channels(tuple(_groups(walk)), walk)


def _visit(walk: Walk, node: fx.Node) -> None:
    if node.op == "placeholder":
        if isinstance(node.meta["val"], Tensor):
            why = Refusal("an input of the model has it", label(node))
            walk.axes[node] = walk.fresh(node.meta["val"].shape, why)
    elif node.op == "get_attr":
        walk.axes[node] = _state_axes(walk, node)
    elif node.op == "output":
        for operand in node.all_input_nodes:
            walk.pin(walk.of(operand), Refusal("an output of the model has it", label(operand)))
    else:
        _visit_call(walk, node)


def _state_axes(walk: Walk, node: fx.Node) -> Axes:
    """Every reader of one tensor sees the same dims."""
    known = next((other for other in walk.axes if other.target == node.target), None)
    if known is not None and known.op == "get_attr":
        return walk.axes[known]
    return walk.fresh(node.meta["val"].shape)


def _visit_call(walk: Walk, node: fx.Node) -> None:
    value = node.meta["val"]
    tensors = isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(one, Tensor) for one in value)
    )
    if not tensors:
        if isinstance(node.target, torch._ops.OpOverload) and not _asks_size(node):
            unfollowed(walk, node, f"{node.target} reads it")
        return
    found = _handled(walk, node)
    if isinstance(found, list):
        walk.lists[node] = found
    else:
        walk.axes[node] = found


def _handled(walk: Walk, node: fx.Node) -> Axes | list[Axes]:
    handler = _HANDLERS.get(node.target) or products.BY_NAME.get(str(node.target))
    if handler is None and pointwise.is_pointwise(node.target):
        handler = pointwise.pointwise
    if handler is None or getattr(node.target, "_schema", None) is None:
        if node.target is operator.getitem:
            return views.HANDLERS[operator.getitem](walk, node, {})
        return unfollowed(walk, node, f"{node.target} isn't followed")
    stored = node.target is torch.ops.aten.copy_.default
    if node.target._schema.is_mutable and not stored:  # type: ignore[union-attr]
        return unfollowed(walk, node, f"{node.target} writes it")
    return handler(walk, node, arguments(node))


def _asks_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _groups(walk: Walk) -> Iterator[Group]:
    places: dict[Dim, list[tuple[fx.Node, int]]] = {}
    state = {node.target: node for node in walk.axes if node.op == "get_attr"}
    for node in state.values():
        for axis, dim in enumerate(walk.axes[node]):
            if walk.dims.has_square(dim):
                walk.dims.pin(dim, Refusal("an axis crosses channels with themselves", label(node)))
            for leaf in dict.fromkeys(walk.dims.leaves(dim)):
                places.setdefault(leaf, []).append((node, axis))
    reads: dict[Dim, list[Read]] = {}
    for read in walk.reads:
        for leaf in dict.fromkeys(walk.dims.leaves(read.dim)):
            reads.setdefault(leaf, []).append(read)
    taken: Counter[str] = Counter()
    for leaf, found in places.items():
        is_channel = isinstance(leaf.size, int) and leaf.size > 1
        if is_channel and "place" not in walk.dims.marks(leaf):
            yield _group(walk, leaf, found, reads.get(leaf, []), taken)


def _group(
    walk: Walk,
    leaf: Dim,
    found: list[tuple[fx.Node, int]],
    reads: list[Read],
    taken: Counter[str],
) -> Group:
    places = tuple(_located(walk, node, axis, leaf) for node, axis in found)
    readers = tuple(_reader(walk, read, leaf) for read in reads)
    group = Group("", "ffn", leaf.size, places, readers, walk.dims.pins(leaf), leaf)
    kind = _kind(group, walk.dims.marks(leaf))
    name = f"{_common_path(group)}.{kind}".lstrip(".")
    taken[name] += 1
    if taken[name] > 1:
        name = f"{name}.{taken[name]}"
    return Group(name, kind, leaf.size, places, readers, group.refusals, leaf)


def _located(walk: Walk, node: fx.Node, axis: int, leaf: Dim) -> Place:
    return Place(node, axis, walk.dims.positions(walk.axes[node][axis], leaf))


def _reader(walk: Walk, read: Read, leaf: Dim) -> Reader:
    weight = None if read.other is None else _located(walk, read.other, read.other_axis, leaf)
    return Reader(read.node, read.kind, _located(walk, read.operand, read.axis, leaf), weight)


def _kind(group: Group, marks: frozenset[str]) -> GroupKind:
    if "head_dim" in marks:
        return "head_dim"
    if "heads" in marks:
        return "queries" if "copied" in marks else "heads"
    if "added" in marks or any(reader.kind in ("norm", "mean") for reader in group.readers):
        return "residual"
    is_hidden = bool(group.readers) and bool(group.producers) and "convolved" not in marks
    return "ffn" if is_hidden else "channels"


def _common_path(group: Group) -> str:
    """The deepest module that holds all producers, else (for a whole stream) the first of them."""
    producers = group.producers or group.places
    paths = [place.name.split(".")[:-1] for place in producers]
    return _common(paths) or ".".join(paths[0]) or module_path(producers[0].node)


def _common(paths: Sequence[Sequence[str]]) -> str:
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
