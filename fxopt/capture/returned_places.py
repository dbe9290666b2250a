"""Outputs that are an input or a buffer which the call itself writes.

    x += 1; return x           the graph:  y = x + 1;  w = copy_(x, y);  return w

An exported graph returns y, memory of its own, where the model returns x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import CaptureError
from fxopt.nodes import fake, same_sizes, source_line
from fxopt.program import Program
from fxopt.sharing import Labels, chain

aten = torch.ops.aten

_VIEW_OF: Mapping[Any, Any] = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
"""The view through which each scatter writes; both take the same arguments after the tensors."""


def returns_written(program: Program) -> bool:
    """Whether an output is in the memory of a value that the program writes to an input or state.

    Whether it is that input or state, or another tensor of the same value, the graph doesn't tell.
    """
    writes = _writes(program.graph)
    roots = {
        chain(part)[-1]
        for write in writes
        for part, _ in _parts(write.args[1], ())  # type: ignore[arg-type]
    }
    results: Any = program.output.args[0]
    paths = map(chain, results)
    return any(path[-1] in roots and not set(writes).intersection(path) for path in paths)


def with_returned_places(program: Program, eager: Labels, whole: Sequence[bool]) -> Program:
    """`program` whose outputs are the written inputs and state, or views of them, where `eager`,
    the labels of an eager call, says so; `whole` tells which outputs are one as it is.

    Raises `CaptureError` for an output that is another view than the graph knows how to make.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.output(graph.graph_copy(program.graph, copies))
    output.meta = dict(program.output.meta)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    labels = {label: write for write in _writes(graph) if (label := _label(graph, write))}
    results: Any = output.args[0]
    output.args = (
        tuple(
            _returned(program, graph, result, labels[label], index, whole[index])
            if label in labels
            else result
            for index, (result, label) in enumerate(zip(results, eager, strict=True))
        ),
    )
    return replace(program, graph=graph)


def _returned(
    program: Program, graph: fx.Graph, result: fx.Node, write: fx.Node, index: int, whole: bool
) -> fx.Node:
    """What stands for `result` as a view of the place that `write` has written."""
    place: Any = write.args[0]
    written: Any = write.args[1]
    path = chain(result)
    if whole:
        return write
    if write in path:
        return result
    if path[-1] is place:  # a view made before the write, and of what it wrote by now
        return _replayed(graph, path[:-1], place, write)
    for part, views in _parts(written, ()):
        if part in path:
            new = write
            for scatter in views:
                source: Any = scatter.args[1]
                new = _after(graph, _VIEW_OF[scatter.target], (new, *scatter.args[2:]), source)
            return _replayed(graph, path[: path.index(part)], part, new)
    if path[-1] is chain(written)[-1] and _holds_all(result, path[-1]):
        return _after(graph, aten.view_as.default, (write, result), result)
    raise CaptureError(
        f"{program.name} returns, as output {index}, a part of {place.target}, which it writes in "
        f"the same call (at {source_line(result) or 'an unknown line'}); the graph can't tell "
        "which part. Return a copy of it, with .clone()."
    )


def _parts(
    written: fx.Node, views: tuple[fx.Node, ...]
) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """What a written value is made of: itself, and each value scattered into it, with the scatters
    whose views lead there."""
    yield written, views
    if written.target in _VIEW_OF:
        base: Any = written.args[0]
        source: Any = written.args[1]
        yield from _parts(source, (*views, written))
        yield from _parts(base, views)


def _replayed(graph: fx.Graph, views: list[fx.Node], source: fx.Node, new: fx.Node) -> fx.Node:
    """The views that lead from `source` to the first of `views`, made of `new` instead."""
    made = {source: new}
    for node in reversed(views):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: made.get(one, one))
        made[node] = _after(graph, node.target, args, node, kwargs)
    return made[views[0]] if views else new


def _after(graph: fx.Graph, target: Any, args: Any, like: fx.Node, kwargs: Any = None) -> fx.Node:
    """A call at the end of the graph, of the type of `like`."""
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    return node


def _holds_all(result: fx.Node, root: fx.Node) -> bool:
    """Whether `result` holds every entry of `root`, in their order in memory."""
    one, other = fake(result), fake(root)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    counts = [tensor.numel() for tensor in (one, other)]
    return same_sizes(counts[:1], counts[1:]) and one.is_contiguous() and other.is_contiguous()


def _writes(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=aten.copy_.default))


def _label(graph: fx.Graph, write: fx.Node) -> str:
    """The label of the place that `write` writes."""
    place: Any = write.args[0]
    if place.op == "get_attr":
        return f"state {place.target}"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return f"input {inputs.index(place)}"
