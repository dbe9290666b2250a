"""In-place operators: which nodes write, and which writes become functional by a local rewrite.

`x.op_(y)` is `op(x, y)` with later uses of x renamed, if x is memory that the graph itself made and
no view of it is alive. Buffers and views need alias analysis; torch's own functionalization does
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.program import arguments

aten = torch.ops.aten

_OTHERWISE_NAMED = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.normal_.default: aten.normal_functional.default,
    aten.zero_.default: aten.zeros_like.default,
}
_TRAINING_ARGUMENT = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}


def writes(node: fx.Node) -> bool:
    """Whether `node` writes to one of its arguments (running statistics of a norm included)."""
    if node.target in _TRAINING_ARGUMENT:
        return bool(node.args[_TRAINING_ARGUMENT[node.target]]) and node.args[3] is not None
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_local_write(node: fx.Node) -> bool:
    """Whether `functional(node)` with renamed uses means the same as this in-place node."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or functional(node) is None or not _keeps_dtype(node):
        return False
    while writes(written) and isinstance(written.args[0], fx.Node):
        written = written.args[0]
    if written.op != "call_function" or _aliases(written):
        return False
    return not any(_aliases(user) and not writes(user) for user in written.users)


def functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator without the write: `aten.add_.Tensor` -> `aten.add.Tensor`; None if unknown."""
    name, _, overload = str(getattr(node.target, "_schema", None) and node.target).rpartition(".")
    base = name.removeprefix("aten.")
    if not name.startswith("aten.") or not base.endswith("_") or base.endswith("__"):
        return None
    packet = getattr(aten, base[:-1], None)
    return getattr(packet, overload, None)


def functional_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """`functional(node)`, for calls with `out=` too: `aten.div.out` -> `aten.div.Tensor`."""
    if node.target in _OTHERWISE_NAMED:
        return _OTHERWISE_NAMED[node.target]
    if "out" not in node.kwargs or not isinstance(node.target, torch._ops.OpOverload):
        return functional(node)
    given = [(a.name, str(a.type)) for a in node.target._schema.arguments if a.name != "out"]
    packet = node.target.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        if not other._schema.is_mutable and given == [
            (a.name, str(a.type)) for a in other._schema.arguments
        ]:
            return other  # type: ignore[no-any-return]
    return None


def functional_arguments(
    node: fx.Node, target: torch._ops.OpOverload
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an in-place `node` as its functional form `target` takes them."""
    if node.target not in _OTHERWISE_NAMED:
        return node.args, {name: value for name, value in node.kwargs.items() if name != "out"}
    given = arguments(node)
    names = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
    return tuple(given[name] for name in names), {}


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the functional form surely has the written tensor's dtype, in spite of promotion."""
    dtypes = {
        argument.meta["val"].dtype
        for argument in node.all_input_nodes
        if isinstance(argument.meta.get("val"), Tensor) and argument.meta["val"].ndim
    }
    dtypes.add(node.meta["val"].dtype)
    name = str(node.target)
    return len(dtypes) == 1 or name.startswith(("aten.index_put_", "aten.masked_fill_"))


def _aliases(node: fx.Node) -> bool:
    """Whether the node's result may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return any(result.alias_info is not None for result in schema.returns)
