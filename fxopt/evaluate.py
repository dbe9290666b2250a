"""Runs a program node by node: the judge's eyes. Never the way to serve a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.program import Program

Observer = Callable[[fx.Node, Any], Any]


def evaluate(
    program: Program, inputs: Sequence[Tensor], observe: Observer | None = None
) -> list[Tensor]:
    """The output tensors of `program` for its input tensors, each value freed after its last use.

    `observe(node, value)` sees every computed value and returns what the rest of the graph is to
    use in its place. Gradients are recorded for a program in train mode only. Buffers that the
    program writes are written to copies, so that judging a program never changes the model.
    """
    values: dict[fx.Node, Any] = {}
    uses = Counter(use for node in program.graph.nodes for use in node.all_input_nodes)
    remaining = iter(inputs)
    written = {
        node.args[0].target
        for node in program.graph.nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "get_attr"
    }
    with torch.set_grad_enabled(program.mode == "train"):
        for node in program.graph.nodes:
            if node.op == "output":
                return [values[result] for result in node.args[0]]
            if node.op == "placeholder":
                value = next(remaining)
            elif node.op == "get_attr":
                value = program.tensor(node.target)
                value = value.detach().clone() if node.target in written else value
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                value = node.target(*args, **kwargs)
            values[node] = observe(node, value) if observe else value
            for used in node.all_input_nodes:
                uses[used] -= 1
                if not uses[used]:
                    del values[used]
    raise AssertionError("a well-formed graph ends in an output node")
