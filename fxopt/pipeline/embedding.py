"""Whether one program computes a part of what another does, and that part of a rewritten one.

An evaluation graph that is a part of the training graph's own evaluation, node by node, needs no
passes of its own: what the passes made of the training graph holds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.nodes import arguments, draws_random, drop_dead_nodes
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.signature import Signature, TensorInput

aten = torch.ops.aten

_LARGEST_CONSTANT = 1 << 12
"""Elements of a constant that is compared by its values."""

_WITHOUT_EFFECT: Mapping[Any, tuple[str, ...]] = {
    aten.batch_norm.default: ("momentum", "cudnn_enabled"),
    aten.instance_norm.default: ("momentum", "cudnn_enabled"),
}
"""Arguments that change nothing where a norm doesn't learn."""


@dataclass(frozen=True)
class Part:
    """A part of a program: `outputs` are the indices of the outputs that it keeps, in its order,
    called as `signature` says."""

    signature: Signature
    outputs: tuple[int, ...]

    def of(self, program: Program) -> Program:
        """This part of `program`, a rewriting of the one that it was found in."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        paths = [tensor.path for tensor in program.signature.tensors]
        named = dict(zip(paths, program.placeholders, strict=True))
        wanted = [named[tensor.path] for tensor in self.signature.tensors]
        others = [node for node in program.placeholders if node not in wanted]
        for node in (*wanted, *others):
            new[node] = _copied(graph, node, new)
        for node in program.graph.nodes:
            if node.op not in ("placeholder", "output"):
                new[node] = _copied(graph, node, new)
        results: Any = program.output.args[0]
        kept = tuple(new[results[index]] for index in self.outputs)
        output = graph.output(kept)
        output.meta = {"val": tuple(node.meta["val"] for node in kept)}
        drop_dead_nodes(graph)
        for node in others:
            graph.erase_node(new[node])
        tensors = dict(zip(paths, program.example, strict=True))
        example = tuple(tensors[tensor.path] for tensor in self.signature.tensors)
        return replace(program.with_graph(graph), signature=self.signature, example=example)


def part_of(part: Program, whole: Program) -> Part | None:
    """Where `part` is found in `whole`, or None: each node, with the same sizes fixed.

    Both are in eval mode and over the same tensors. All that either writes the other writes too.
    """
    inputs = {tensor.path: tensor for tensor in whole.signature.tensors}
    if not all(_takes(inputs.get(one.path), one) for one in part.signature.tensors):
        return None
    numbers = _Numbering(whole, part)
    ours, theirs = numbers.of(part), numbers.of(whole)
    results: Any = whole.output.args[0]
    places: dict[int, int] = {}
    for index, result in enumerate(results):
        places.setdefault(theirs[result], index)
    wanted: Any = part.output.args[0]
    if not all(ours[node] in places for node in wanted):
        return None
    if _written(part, ours) != _written(whole, theirs):
        return None
    found = []
    for index, node in enumerate(wanted):
        alike = index < len(results) and theirs[results[index]] == ours[node]
        found.append(index if alike else places[ours[node]])
    return Part(part.signature, tuple(found))


class _Numbering:
    """Equal numbers for equal values, over the nodes of several programs."""

    def __init__(self, *programs: Program) -> None:
        self.numbers: dict[Any, int] = {}
        shared = set.intersection(*(set(program.state) for program in programs))
        self.same = {
            name
            for name in shared
            if all(program.state[name] is programs[0].state[name] for program in programs)
        }

    def of(self, program: Program) -> dict[fx.Node, int]:
        found: dict[fx.Node, int] = {}
        paths = iter(program.signature.tensors)
        draws = itertools.count()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                key: Any = ("input", next(paths).path)
            elif node.op == "get_attr":
                key = self._state(program, str(node.target))
            elif node.target is aten.detach.default:
                found[node] = found[node.args[0]]
                continue
            elif node.op == "output":
                continue
            else:
                # Two draws are two values, however alike their calls are.
                key = (_call(node, found), next(draws) if draws_random(node) else None)
            found[node] = self.numbers.setdefault(key, len(self.numbers))
        return found

    def _state(self, program: Program, name: str) -> Any:
        tensor = program.state[name]
        if name in self.same or isinstance(tensor, Recipe):
            return ("state", name)
        if tensor.numel() <= _LARGEST_CONSTANT:
            return ("constant", str(tensor.dtype), tuple(tensor.shape), repr(tensor.tolist()))
        return ("state", id(tensor))


def _call(node: fx.Node, found: Mapping[fx.Node, int]) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return (str(target), _spelled((node.args, node.kwargs), found))
    given = arguments(node)
    for name in _WITHOUT_EFFECT.get(target, ()):
        if not given.get("training", given.get("use_input_stats")):
            del given[name]
    return (str(target), _spelled(given, found))


def _spelled(value: Any, found: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return ("node", found[value])
    if isinstance(value, Mapping):
        return tuple((name, _spelled(one, found)) for name, one in sorted(value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(_spelled(one, found) for one in value)
    return (type(value).__name__, repr(value))


def _written(program: Program, numbers: Mapping[fx.Node, int]) -> frozenset[tuple[int, int]]:
    writes = (node for node in program.graph.nodes if node.target is aten.copy_.default)
    return frozenset((numbers[node.args[0]], numbers[node.args[1]]) for node in writes)


def _takes(known: TensorInput | None, wanted: TensorInput) -> bool:
    """Whether two captures took an input of one kind, and fixed the same of its sizes."""
    if known is None or known.dtype != wanted.dtype or len(known.sizes) != len(wanted.sizes):
        return False
    pairs = zip(known.sizes, wanted.sizes, strict=True)
    return all(a == b if isinstance(a, int) else isinstance(b, str) for a, b in pairs)


def _copied(graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, new.__getitem__)
    copy.meta = dict(node.meta)
    return copy


def is_whole(part: Part, program: Program) -> bool:
    """Whether the part is all of `program`, called in the same way."""
    mine, other = part.signature, program.signature
    results: Any = program.output.args[0]
    return (
        part.outputs == tuple(range(len(results)))
        and [one.path for one in mine.tensors] == [one.path for one in other.tensors]
        and mine.out_spec == other.out_spec
        and mine.out_constants == other.out_constants
        and mine.constants == other.constants
        # A training norm needs two values a channel, evaluation takes one.
        and {repr(guard.holds) for guard in mine.guards}
        == {repr(guard.holds) for guard in other.guards}
    )


def same_tensor(one: Tensor | Recipe, other: Tensor | Recipe) -> bool:
    """Whether two entries of states are one tensor, or have the same values by now."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = [
        tensor.materialize() if isinstance(tensor, Recipe) else tensor for tensor in (one, other)
    ]
    return bool(torch.equal(*pair))
