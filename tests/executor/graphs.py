"""Graphs built node by node, with the values that a program's nodes hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only


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
