"""What the nodes of a graph tell: their names, places, values and sizes, and their effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.program import Mode, Origin

UNKNOWN_SIZE = 64
"""What a cost is estimated for where a size depends on data that nobody has seen."""


def module_path(node: fx.Node) -> str:
    """The path of the module that the node came from, such as `encoder.layer.0.output`."""
    return str(node.meta.get("module_path", ""))


def label(node: fx.Node) -> str:
    """How messages name a node: module path (where there is one) and node name."""
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name


def source_line(node: fx.Node) -> str:
    """The model's source line that the node came from, as `file:line  code`; empty if unknown."""
    return str(node.meta.get("source", ""))


def origins(node: fx.Node) -> tuple[Origin, ...]:
    """Which passes made the state behind `node` what it is, the first one first."""
    found: tuple[Origin, ...] = node.meta.get("origins", ())
    return found


def note_origins(graph: fx.Graph, known: Mapping[str, tuple[Origin, ...]]) -> None:
    """Give the nodes of a new graph the origins that the names of their state have in `known`."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in known:
            node.meta["origins"] = known[str(node.target)]


def fake(node: Any) -> Any:
    """The fake value of a node; any other value as it is."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def draws_random(node: fx.Node) -> bool:
    """Whether `node` calls an operator that draws random numbers, and isn't told not to.

    An operator's own flag counts, whatever the mode of the program: a dropout that a model keeps on
    in evaluation draws, one that it froze doesn't, nor does attention without dropout.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    trains = [given[flag] for flag in ("train", "training") if flag in given]
    rates = [given[rate] for rate in ("p", "dropout_p", "dropout") if rate in given]
    return not (False in trains or (rates and not any(rates)))


def is_pure(node: fx.Node, mode: Mode = "eval") -> bool:
    """Whether dropping an unused `node` changes nothing: no write, and in training no draw."""
    if node.op in ("placeholder", "output"):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target._schema.is_mutable:
        return False
    return mode == "eval" or not draws_random(node)


def drop_dead_nodes(graph: fx.Graph, mode: Mode = "eval") -> list[str]:
    """Erase pure nodes that nobody uses, last first; return the names of the operations erased."""
    erased = []
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node, mode):
            if node.op == "call_function":
                erased.append(node.name)
            graph.erase_node(node)
    return erased


def constants_below(nodes: Iterable[fx.Node]) -> set[str]:
    """The names of the state that `nodes` read, directly or as an expression of constants."""
    found: set[str] = set()
    for node in nodes:
        for operand in (node, *node.all_input_nodes):
            found |= _names_of_constant(operand) or set()
    return found


def _names_of_constant(node: fx.Node) -> set[str] | None:
    """The names that an expression of constants reads; None for what depends on inputs."""
    if node.op == "get_attr":
        return {str(node.target)}
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    names: set[str] = set()
    for operand in node.all_input_nodes:
        below = _names_of_constant(operand)
        if below is None:
            return None
        names |= below
    return names


def same_sizes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes (or strides) are provably equal, symbolic sizes compared as expressions.

    Asking `==` of symbolic sizes would record a guard; comparing expressions doesn't.
    """
    return len(one) == len(other) and all(map(_same_size, one, other))


def _same_size(one: Any, other: Any) -> bool:
    one, other = (s.node.expr if isinstance(s, torch.SymInt) else s for s in (one, other))
    return bool(one == other)


def size_at_capture(size: Any) -> int:
    """A size as it was in the example, also where it is dynamic. Records no guard.

    One that depends on data is as `observe_sizes` saw it, or `UNKNOWN_SIZE` where nothing has.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    node = size.node
    if node.has_hint() and node.hint is not None:
        return int(node.hint)
    env = node.shape_env
    observed = {
        symbol: sympy.Integer(env.var_to_hint_override.get(symbol, UNKNOWN_SIZE))
        for symbol in free_unbacked_symbols(size)
    }
    hint = getattr(env, "guarding_hint_or_throw", None) or env.size_hint  # torch renamed it
    return int(hint(node.expr.xreplace(observed)))
