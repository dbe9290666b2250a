"""Sizes that depend on data: how many rows a mask keeps, how many tokens an expert gets.

No graph tells them, so they are observed once, in a run of the program on its example. What
estimates a cost takes them from there (`size_at_capture`); no decision about results does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.interpreter import evaluate, same_draws
from fxopt.nodes import label, source_line
from fxopt.program import Program


def observe_sizes(program: Program) -> tuple[str, ...]:
    """Note for each size that depends on data how large it was in the example; a line on each.

    The hints of the program's symbols are all that changes. A program without such sizes isn't run.
    """
    unknown = {symbol for node in program.graph.nodes for symbol, _ in _sizes(node, None)}
    if not unknown:
        return ()
    observed: dict[Any, tuple[int, fx.Node]] = {}

    def observe(node: fx.Node, value: Any) -> Any:
        for symbol, size in _sizes(node, value):
            observed.setdefault(symbol, (size, node))
        return value

    with same_draws():
        evaluate(program, program.example, observe)
    env = program.fake_mode.shape_env
    assert env is not None
    env.var_to_hint_override.update({symbol: size for symbol, (size, _) in observed.items()})
    return tuple(
        f"a size depends on data at {source_line(node) or label(node)}: costs are estimated for "
        f"{size}, as in the example"
        for size, node in observed.values()
    )


def _sizes(node: fx.Node, value: Any) -> Iterator[tuple[Any, int]]:
    """The symbols that depend on data among the sizes of a node's value, with those of `value`."""
    fakes = pytree.tree_leaves(node.meta.get("val"))
    leaves = fakes if value is None else pytree.tree_leaves(value)
    for known, leaf in zip(fakes, leaves, strict=True):
        pair = (known.shape, leaf.shape) if isinstance(known, Tensor) else ((known,), (leaf,))
        for size, actual in zip(*pair, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols = free_unbacked_symbols(size)
                yield from ((symbol, 0 if value is None else int(actual)) for symbol in symbols)
