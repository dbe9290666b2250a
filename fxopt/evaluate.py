"""Runs a program node by node: the judge's eyes. Never the way to serve a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.program import Program, is_pure

Observer = Callable[[fx.Node, Any], Any]


def evaluate(
    program: Program, inputs: Sequence[Tensor], observe: Observer | None = None
) -> list[Tensor]:
    """The output tensors of `program` for its input tensors, each value freed after its last use.

    `observe(node, value)` sees every computed value and returns what the rest of the graph is to
    use in its place. Gradients are recorded for a program in train mode only. Buffers and
    inputs that the program writes are written to copies, so that judging changes neither.
    """
    return _Evaluation(program, [inputs], observe).run()[0]


def evaluate_all(program: Program, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`evaluate` for several sets of inputs in one walk.

    What depends on constants alone, a dequantized or concatenated weight, is computed once and
    freed as early as in a single run. In train mode the sets run one after the other, since random
    operators must draw in the order of the eager model.
    """
    if program.mode == "train":
        return [evaluate(program, inputs) for inputs in batches]
    return _Evaluation(program, batches, None).run()


class _Evaluation:
    """One walk: values that are the same in every run, and those of each run."""

    def __init__(
        self, program: Program, batches: Sequence[Sequence[Tensor]], observe: Observer | None
    ) -> None:
        self.program = program
        self.observe = observe
        self.inputs = [iter(inputs) for inputs in batches]
        self.shared: dict[fx.Node, Any] = {}
        self.constants: set[fx.Node] = set()
        self.own: list[dict[fx.Node, Any]] = [{} for _ in batches]
        nodes = program.graph.nodes
        self.uses = Counter(used for node in nodes for used in node.all_input_nodes)
        self.written = {
            node.args[0] for node in nodes if node.target is torch.ops.aten.copy_.default
        }

    def run(self) -> list[list[Tensor]]:
        with torch.set_grad_enabled(self.program.mode == "train"):
            for node in self.program.graph.nodes:
                if node.op == "output":
                    return [[self._value(run, out) for out in node.args[0]] for run in self.own]
                self._visit(node)
                for used in node.all_input_nodes:
                    self.uses[used] -= 1
                    if not self.uses[used]:
                        self._free(used)
        raise AssertionError("a well-formed graph ends in an output node")

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            for run, inputs in zip(self.own, self.inputs, strict=True):
                run[node] = self._seen(node, self._own(node, next(inputs)))
        elif node.op == "get_attr":
            self.constants.add(node)
        elif self._is_shared(node):
            self.shared[node] = self._seen(node, self._compute(node, {}))
        else:
            for run in self.own:
                run[node] = self._seen(node, self._compute(node, run))

    def _own(self, node: fx.Node, value: Tensor) -> Tensor:
        return value.detach().clone() if node in self.written else value

    def _is_shared(self, node: fx.Node) -> bool:
        operands = node.all_input_nodes
        return (
            bool(operands)
            and all(operand in self.shared or operand in self.constants for operand in operands)
            and is_pure(node, "train")
        )

    def _compute(self, node: fx.Node, run: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(run, n))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, run: dict[fx.Node, Any], node: fx.Node) -> Any:
        if node in self.constants:
            self._load(node)
        return self.shared[node] if node in self.shared else run[node]

    def _load(self, node: fx.Node) -> None:
        """Bring in a constant at its first use: all recipes at the head would be held at once."""
        value = self._own(node, self.program.tensor(str(node.target)))
        self.shared[node] = self._seen(node, value)
        self.constants.remove(node)

    def _seen(self, node: fx.Node, value: Any) -> Any:
        return self.observe(node, value) if self.observe else value

    def _free(self, node: fx.Node) -> None:
        if self.shared.pop(node, None) is None:
            for run in self.own:
                run.pop(node, None)
