"""Runs a program node by node: the judge's eyes. Never the way to serve a model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxopt.nodes import is_pure
from fxopt.program import Program

Observer: TypeAlias = Callable[[fx.Node, Any], Any]
_COPY = torch.ops.aten.copy.default
"""What a write gives, without writing."""

Override: TypeAlias = Mapping[fx.Node, Callable[..., Any]]
"""A node -> what computes its value from those of its operands, in place of its target."""


def evaluate(
    program: Program,
    inputs: Sequence[Tensor],
    observe: Observer | None = None,
    override: Override | None = None,
) -> list[Tensor]:
    """The output tensors of `program` for its input tensors, each value freed after its last use.

    `observe(node, value)` sees every computed value and returns what the rest of the graph is to
    use in its place. `override[node]` is called as the node's target would be, with the values of
    its arguments. Gradients are recorded for a program in train mode only. Nothing is
    written to buffers and inputs: what a write gives is what would be in them after it.
    """
    return _Evaluation(program, [inputs], observe, override).run()[0]


def evaluate_all(program: Program, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`evaluate` for several sets of inputs in one walk.

    What depends on constants alone, a dequantized or concatenated weight, is computed once and
    freed as early as in a single run. In train mode the sets run one after the other, since random
    operators must draw in the order of the eager model.
    """
    if program.mode == "train":
        return [evaluate(program, inputs) for inputs in batches]
    return _Evaluation(program, batches).run()


def evaluate_variants(
    program: Program,
    inputs: Sequence[Tensor],
    variants: Sequence[Override],
    override: Override | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """`(index, evaluate(program, inputs, override=variants[index]))` for each of `variants`.

    They come in the order in which they first differ from the program: what lies before that place
    is computed once for all, so that evenly spread variants take half of a run each. At any time
    the values of two runs are alive. Each variant draws the random numbers that the program draws.
    `override` holds in all of them, but at the nodes for which a variant has its own.
    """
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    starts = [min(variant, key=place.__getitem__, default=program.output) for variant in variants]
    common = _Evaluation(program, [inputs], override=override)
    for index in sorted(range(len(variants)), key=lambda index: place[starts[index]]):
        common.run_to(starts[index])
        with fork_rng():
            outputs = common.fork({**common.override, **variants[index]}).run()[0]
        yield index, outputs


@contextmanager
def fork_rng() -> Iterator[None]:
    """What is drawn inside leaves the random generators, on every device, where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def same_draws() -> Iterator[None]:
    """Random operators draw the same numbers in every run; the caller's generators stay put."""
    with fork_rng():
        # What torch.manual_seed does, but for devices that this process hasn't woken: for each of
        # those it formats the whole stack, and its seed would outlast the block.
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        yield


class _Evaluation:
    """One walk: values that are the same in every run, and those of each run."""

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Tensor]],
        observe: Observer | None = None,
        override: Override | None = None,
    ) -> None:
        self.program = program
        self.observe = observe
        self.override: Override = override or {}
        self.inputs = [dict(zip(program.placeholders, inputs, strict=True)) for inputs in batches]
        self.shared: dict[fx.Node, Any] = {}
        self.constants: set[fx.Node] = set()
        self.own: list[dict[fx.Node, Any]] = [{} for _ in batches]
        nodes = program.graph.nodes
        self.next: fx.Node = next(iter(nodes))
        self.uses = Counter(used for node in nodes for used in node.all_input_nodes)

    def run(self) -> list[list[Tensor]]:
        output = self.program.output
        self.run_to(output)
        results: Any = output.args[0]
        return [[self._value(run, result) for result in results] for run in self.own]

    def run_to(self, stop: fx.Node) -> None:
        """Compute what comes before `stop`."""
        with torch.set_grad_enabled(self.program.mode == "train"):
            while self.next is not stop:
                node, self.next = self.next, self.next.next
                self._visit(node)
                for used in node.all_input_nodes:
                    self.uses[used] -= 1
                    if not self.uses[used]:
                        self._free(used)

    def fork(self, override: Override) -> _Evaluation:
        """A walk that goes on from here by itself; their tensors are shared."""
        twin = copy.copy(self)
        twin.override = override
        twin.uses, twin.constants = Counter(self.uses), set(self.constants)
        twin.shared = dict(self.shared)
        twin.own = [dict(run) for run in self.own]
        return twin

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            for run, inputs in zip(self.own, self.inputs, strict=True):
                run[node] = self._seen(node, inputs[node])
        elif node.op == "get_attr":
            self.constants.add(node)
        elif self._is_shared(node):
            self.shared[node] = self._seen(node, self._compute(node, {}))
        else:
            for run in self.own:
                run[node] = self._seen(node, self._compute(node, run))

    def _is_shared(self, node: fx.Node) -> bool:
        operands = node.all_input_nodes
        return (
            bool(operands)
            and all(operand in self.shared or operand in self.constants for operand in operands)
            and is_pure(node, "train")
        )

    def _compute(self, node: fx.Node, run: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(run, n))
        target = _COPY if node.target is torch.ops.aten.copy_.default else node.target
        compute = self.override.get(node, target)
        return compute(*args, **kwargs)  # type: ignore[operator]

    def _value(self, run: dict[fx.Node, Any], node: fx.Node) -> Any:
        if node in self.constants:
            self._load(node)
        return self.shared[node] if node in self.shared else run[node]

    def _load(self, node: fx.Node) -> None:
        """Bring in a constant at its first use: all recipes at the head would be held at once."""
        value = self.program.tensor(str(node.target))
        self.shared[node] = self._seen(node, value)
        self.constants.remove(node)

    def _seen(self, node: fx.Node, value: Any) -> Any:
        return self.observe(node, value) if self.observe else value

    def _free(self, node: fx.Node) -> None:
        if self.shared.pop(node, None) is None:
            for run in self.own:
                run.pop(node, None)
