"""Which memory each output is in: an input's, that of a state tensor, or memory of its own.

A caller may write into what a model returned. That is seen by whatever shares the memory, so a
rewritten program shares exactly what the original does. Both sides are told as one label for each
output: `input 0`, `state h0`, or `output k`, where k is the first output in that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from fxopt.nodes import arguments, fake
from fxopt.operators.dropout import DROPOUT
from fxopt.operators.views import RESHAPES_BY_STRIDES
from fxopt.recipe import Recipe

aten = torch.ops.aten

Labels = tuple[str, ...]

_ALIASING_WITHOUT_SAYING = frozenset(
    (
        aten.type_as.default,
        *DROPOUT,
        aten.einsum.default,
        aten.broadcast_tensors.default,
        aten.meshgrid.default,
        aten.meshgrid.indexing,
        aten.atleast_1d.default,
        aten.atleast_2d.default,
        aten.atleast_3d.default,
        aten.atleast_1d.Sequence,
        aten.atleast_2d.Sequence,
        aten.atleast_3d.Sequence,
        aten.sum_to_size.default,
    )
)
"""Composite operators that may return an operand, or a view of it, without saying so in their
schema."""

_BY_STRIDES = frozenset(
    (
        *RESHAPES_BY_STRIDES,
        aten.contiguous.default,
        aten.sum_to_size.default,
        aten.einsum.default,
    )
)
"""Operators that return a view or a copy, whichever the strides at the call allow."""


def may_alias(node: fx.Node) -> bool:
    """Whether the value of `node` may be in the memory of one of its operands."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return any(isinstance(fake(operand), (tuple, list)) for operand in node.all_input_nodes)
    if node.target in _ALIASING_WITHOUT_SAYING or node.target.overloadpacket is aten.to:
        return _keeps_type(node)
    return any(result.alias_info is not None for result in node.target._schema.returns)


def may_copy(node: fx.Node) -> bool:
    """Whether `node`, which may alias, gives memory of its own at some calls: by the strides of
    its operand, or because it is told to copy."""
    if node.target in _BY_STRIDES or node.target in _ALIASING_WITHOUT_SAYING:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.overloadpacket is not aten.to:
        return False
    given = arguments(node)
    return bool(given.get("copy")) or given.get("memory_format") is not None


def reaches_output(node: fx.Node) -> bool:
    """Whether an output may be in the memory of `node`'s value."""
    seen = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user not in seen and may_alias(user):
                seen.add(user)
                waiting.append(user)
    return False


def is_returned_in_place(node: fx.Node) -> bool:
    """Whether an output is in the memory of `node`'s value, and that in an input's or a state's."""
    return reaches_output(node) and chain(node)[-1].op in ("placeholder", "get_attr")


def chain(node: fx.Node) -> list[fx.Node]:
    """From `node` back to where its memory is made: an input, state, or a call that allocates it.

    Each call that may alias is run on fake tensors, so that a view is told from a copy.
    """
    found = [node]
    while (source := _source(found[-1])) is not None:
        found.append(source)
    return found


def memory(graph: fx.Graph) -> Labels:
    """The label of each output, as the graph says: at the sizes and strides of its fake values."""
    output: fx.Node = next(iter(reversed(graph.nodes)))
    results: Any = output.args[0]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first: dict[fx.Node, str] = {node: f"input {index}" for index, node in enumerate(inputs)}
    labels: list[str] = []
    for index, result in enumerate(results):
        root = chain(result)[-1]
        own = f"state {root.target}" if root.op == "get_attr" else f"output {index}"
        labels.append(first.setdefault(root, own))
    return tuple(labels)


def observed(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], state: Mapping[str, Tensor | Recipe]
) -> Labels:
    """The label of each of the `outputs` of a call, told by the memory they are really in."""
    known: dict[int, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            known.setdefault(place(tensor), f"state {name}")
    known.update((place(tensor), f"input {index}") for index, tensor in enumerate(inputs))
    return tuple(
        known.setdefault(place(output), f"output {index}") for index, output in enumerate(outputs)
    )


def shared_too_much(labels: Labels, original: Labels, names: Sequence[str]) -> str | None:
    """What shares memory in a call's outputs but not in the original's; None where nothing does."""
    for index, label in enumerate(labels):
        kind, _, which = label.partition(" ")
        if label in (f"output {index}", original[index]):
            continue
        if kind == "output" and original[index] == original[int(which)]:
            continue
        if kind == "state" and original[index].startswith("state "):
            continue  # one tensor under two names
        other = f"output {names[int(which)]}" if kind == "output" else label
        return f"{names[index]} shares memory with {other}, which it doesn't in the original"
    return None


def place(tensor: Tensor) -> int:
    """What two tensors have in common if they are in one memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # an opaque layout has no storage
        return id(tensor)


def _keeps_type(node: fx.Node) -> bool:
    """Whether a call has the dtype and device of its first operand, without which it is no view."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    new, old = fake(node), fake(first)
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return True
    return new.dtype == old.dtype and new.device == old.device


def _source(node: fx.Node) -> fx.Node | None:
    """The operand in whose memory the value of `node` is; None where it is in its own."""
    if not may_alias(node):
        return None
    if node.target is aten.copy_.default:
        return node.args[0]  # type: ignore[return-value]
    if isinstance(node.target, torch._ops.OpOverload):
        return _shared_operand(node, lambda value: value)
    container, index = node.args
    if not isinstance(container, fx.Node) or not may_alias(container):
        return None
    return _shared_operand(container, lambda value: value[index])


def _shared_operand(node: fx.Node, part: Callable[[Any], Any]) -> fx.Node | None:
    """The operand of a call in whose memory a part of its result is, by a run on fake tensors."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if not tensors:
        return None
    mode = tensors[0].fake_mode  # type: ignore[attr-defined]
    with mode, torch.no_grad(), enable_python_dispatcher():
        result = part(node.target(*args, **kwargs))  # type: ignore[operator]
    where = place(result)
    for operand in node.all_input_nodes:
        value = fake(operand)
        if isinstance(value, Tensor) and place(value) == where:
            return operand
    return None
