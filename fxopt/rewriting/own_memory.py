"""Outputs keep the memory that they had: what a rewrite made them share is copied apart."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.errors import RewriteError
from fxopt.graph_text import describe
from fxopt.rewriting.edit import inherited
from fxopt.sharing import chain, may_alias, memory

aten = torch.ops.aten


def keep_sharing(before: fx.Graph, after: fx.Graph, who: str) -> None:
    """Let the outputs of `after` share memory as those of `before` do, with inputs, state and
    each other, by copies (`aten.clone`) where they share more or, strides having changed, less.

    Raises `RewriteError` where no copy can do that: an output was a view of an input or of state,
    and isn't any more.
    """
    wanted, found = memory(before), memory(after)
    for _ in range(2):
        for label in dict.fromkeys(wanted):
            if label.startswith("output ") and _differs(wanted, found, label):
                _copy_apart(after, [i for i, other in enumerate(wanted) if other == label])
                found = memory(after)
    if found == wanted:
        return
    index = next(i for i, label in enumerate(found) if label != wanted[i])
    result = _results(after)[index]
    raise RewriteError(
        f"{who} broke the memory of output {index}: it was in that of {wanted[index]}, and is in "
        f"that of {found[index]} now. A rule must replace a view by a view of the same tensor.\n"
        f"  node: {describe(result)}"
    )


def _differs(wanted: tuple[str, ...], found: tuple[str, ...], label: str) -> bool:
    """Whether the outputs that are in the memory `label` share it with others, or don't share it.

    Of two that share by mistake, the later one is copied.
    """
    group = [index for index, other in enumerate(wanted) if other == label]
    return {found[index] for index in group} != {label}


def _copy_apart(graph: fx.Graph, group: list[int]) -> None:
    """Copy the value that the outputs of `group` are all views of.

    Where one of them is a copy by now, for strides that changed, a contiguous copy of what they
    come from lets it be a view again.
    """
    results = [_results(graph)[index] for index in group]
    layout = torch.preserve_format
    paths = [chain(result) for result in results]
    if not (shared := _first_common(paths)):
        layout = torch.contiguous_format
        paths = [_widest_chain(result) for result in results]
        if not (shared := _first_common(paths)):
            return
    copy = _copied(graph, shared, layout)
    views = {node for path in paths for node in path[: path.index(shared)]}
    shared.replace_all_uses_with(copy, lambda user: user in views, propagate_meta=False)
    outputs = [
        copy if index in group and result is shared else result
        for index, result in enumerate(_results(graph))
    ]
    next(iter(reversed(graph.nodes))).args = (tuple(outputs),)


def _first_common(paths: list[list[fx.Node]]) -> fx.Node | None:
    return next((node for node in paths[0] if all(node in path for path in paths)), None)


def _copied(graph: fx.Graph, value: fx.Node, layout: torch.memory_format) -> fx.Node:
    with graph.inserting_after(value):
        copy = graph.call_function(aten.clone.default, (value,), {"memory_format": layout})
    with value.meta["val"].fake_mode:
        copied = value.meta["val"].clone(memory_format=layout)
    copy.meta = {**inherited(value), "val": copied}
    return copy


def _widest_chain(node: fx.Node) -> list[fx.Node]:
    """From `node` back through every call that might alias its first operand."""
    found = [node]
    while may_alias(found[-1]) and found[-1].all_input_nodes:
        found.append(found[-1].all_input_nodes[0])
    return found


def _results(graph: fx.Graph) -> list[fx.Node]:
    return list(next(iter(reversed(graph.nodes))).args[0])
