"""A program whose calls are executed as listings, one for each kind of inputs."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.executor.fusions import fusions_of
from fxopt.executor.layout import ATTENTIONS, Layout, NotListedError, prefixes_of
from fxopt.executor.rules import RULES
from fxopt.graph_modules import owner_of
from fxopt.kernels import native

_MOST_KINDS = 64
"""Kinds of calls for which a listing is kept, or why there is none."""


@dataclass(frozen=True)
class _Listed:
    """A listing ready to be executed: its words, and its constants, int64 [C]."""

    code: Tensor
    constants: Tensor


class Executor:
    """Calls of a graph module in inference on a CPU, by listings where there are some for them."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._graph = module.graph
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        prefixes = prefixes_of(module.graph)
        self._plain = [i for i, node in enumerate(placeholders) if node not in prefixes]
        self._fused = fusions_of(module.graph)
        self._tables = _tables(module)
        self._held: list[Tensor] = []
        self._known: dict[Hashable, _Listed | str] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The outputs for `inputs`; None where no listing computes them, or nothing runs one."""
        if not native.running("decoding"):
            return None
        listed = self._listed(inputs)
        if isinstance(listed, str):
            return None
        given = list(inputs)
        for index in self._plain:
            given[index] = inputs[index].contiguous()
        held = [*self._held, listed.constants]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.fxopt.execute(listed.code, given, held))

    def refusal(self, inputs: Sequence[Tensor]) -> str | None:
        """Why no listing computes the outputs for `inputs`; None where one does."""
        listed = self._listed(inputs)
        return listed if isinstance(listed, str) else None

    def _listed(self, inputs: Sequence[Tensor]) -> _Listed | str:
        """The listing for `inputs` and the tensors that the module holds by now, or why none."""
        held = [table[name] for table, name in self._tables.values()]
        if len(held) != len(self._held) or any(map(operator.is_not, held, self._held)):
            self._known.clear()
            self._held = held
        kind = tuple([(inputs[index].shape, inputs[index].dtype) for index in self._plain])
        return self._known.get(kind) or self._made(kind, inputs)

    def _made(self, kind: Hashable, inputs: Sequence[Tensor]) -> _Listed | str:
        tensors = {name: (i, self._held[i]) for i, name in enumerate(self._tables)}
        try:
            layout = Layout(self._graph, tensors, inputs)
            listing = layout.write(RULES, self._fused)
            found: _Listed | str = _Listed(
                listing.encoded(len(inputs), len(tensors) + 1), listing.constants_encoded()
            )
        except NotListedError as error:
            found = str(error)
        if len(self._known) >= _MOST_KINDS:
            self._known.clear()
        self._known[kind] = found
        return found


def executor_of(module: fx.GraphModule) -> Executor | None:
    """An executor for `module`, a step of generation; None for other programs, and where the
    kernels that it needs aren't for this CPU."""
    nodes = module.graph.nodes
    if not any(node.target in ATTENTIONS for node in nodes):
        return None
    if any(node.op not in _OPS or _is_written(node) for node in nodes):
        return None
    return Executor(module) if native.load(native.decoding()) else None


_OPS = ("placeholder", "get_attr", "call_function", "output")


def _is_written(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _tables(module: fx.GraphModule) -> dict[str, tuple[dict[str, Any], str]]:
    """Where the module keeps each tensor that its graph reads, by name."""
    found = {}
    for node in module.graph.nodes:
        if node.op != "get_attr" or node.target in found:
            continue
        owner, leaf = owner_of(module, str(node.target))
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        found[str(node.target)] = (table, leaf)
    return found
