"""Graphs built node by node, with the values that a program's nodes hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxopt.executor import Executor

aten = torch.ops.aten


class Built:
    """A graph over state and inputs whose every node's value is known while it is built."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[Tensor] = []
        self.state: dict[str, Tensor] = {}

    def input(self, tensor: Tensor) -> fx.Node:
        """An input of which `tensor` is an example."""
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(tensor)
        return self._valued(node, tensor)

    def constant(self, tensor: Tensor) -> fx.Node:
        """A tensor of the state."""
        name = f"w{len(self.state)}"
        self.state[name] = tensor
        return self._valued(self.graph.get_attr(name), tensor)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `target`."""
        node = self.graph.call_function(target, args, kwargs)
        values = tree_map_only(fx.Node, lambda one: one.meta["val"], (args, kwargs))
        return self._valued(node, target(*values[0], **values[1]))

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        """The graph as a module that returns `outputs`."""
        self.graph.output(tuple(outputs))
        root = nn.Module()
        for name, tensor in self.state.items():
            root.register_buffer(name, tensor)
        return fx.GraphModule(root, self.graph)

    @staticmethod
    def _valued(node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        return node


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def rms_norm(built: Built, x: fx.Node, weight: fx.Node | None) -> fx.Node:
    squares = built.call(aten.pow.Tensor_Scalar, x, 2)
    mean = built.call(aten.mean.dim, squares, [-1], True)
    unit = built.call(aten.rsqrt.default, built.call(aten.add.Tensor, mean, 1e-2))
    normed = built.call(aten.mul.Tensor, x, unit)
    return normed if weight is None else built.call(aten.mul.Tensor, weight, normed)


def run(built: Built, *outputs: fx.Node) -> tuple[list[Tensor], list[Tensor]]:
    """What the listing gives, and what the graph does."""
    module = built.module(*outputs)
    executor = Executor(module)
    refusal = executor.refusal(built.inputs)
    assert refusal is None, refusal
    found = executor(built.inputs)
    assert found is not None
    with torch.no_grad():
        return list(found), list(module(*built.inputs))
