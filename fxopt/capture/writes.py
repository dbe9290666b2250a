"""In-place operators: which nodes write, and the functional call that gives what they write.

    x.op_(y)                     op(x, y), in the dtype of x
    op(y, out=x)                 op(y), in the dtype of x
    x.copy_(y)                   y with the sizes and dtype of x
    batch_norm(x, training)      its functional form, which returns the new running statistics
    instance_norm(x, training)   instance_norm without state, and running statistics of their own

The operator stays the one that the model called: nothing is decomposed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxopt.nodes import arguments, same_sizes

aten = torch.ops.aten

Build = Callable[..., fx.Node]
"""`build(target, *args, **kwargs)` writes a call into the functional graph."""

_TRAINING_ARGUMENT = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
_NAMED_OTHERWISE = MappingProxyType(
    {
        aten.zero_.default: aten.zeros_like.default,
        aten.fill_.Scalar: aten.full_like.default,
        aten.normal_.default: aten.normal_functional.default,
        aten.bernoulli_.float: aten.bernoulli.p,
    }
)

_NO_VALUES = frozenset(("set_", "resize_", "resize_as_", "as_strided_"))
"""They give a tensor other memory, or another look at it, and no values."""


@dataclass(frozen=True)
class Written:
    """What a node that writes gives: its `result`, where that isn't what it has written, and the
    new value of each argument that it writes, by the argument's name."""

    values: Mapping[str, fx.Node] = field(default_factory=dict)
    result: fx.Node | None = None


def writes(node: fx.Node) -> bool:
    """Whether `node` writes to one of its arguments (running statistics of a norm included)."""
    if node.target in _TRAINING_ARGUMENT:
        return bool(node.args[_TRAINING_ARGUMENT[node.target]]) and node.args[3] is not None
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def changes_shape(node: fx.Node) -> bool:
    """Whether `node` gives its argument other sizes instead of other values (`unsqueeze_`)."""
    return torch.Tag.inplace_view in getattr(node.target, "tags", ())


def functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator without the write: `aten.add_.Tensor` -> `aten.add.Tensor`; None if unknown."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target in _NAMED_OTHERWISE:
        return _NAMED_OTHERWISE[target]
    base, _, overload = str(target).removeprefix("aten.").rpartition(".")
    if _out(target) is not None:
        return _without_out(target)
    if base.startswith("__i") and base.endswith("__"):
        base = f"__{base[3:]}"
        return getattr(getattr(aten, base, None), overload, None)
    if not base.endswith("_") or base.endswith("__") or base in _NO_VALUES:
        return None
    return getattr(getattr(aten, base[:-1], None), overload, None)


def written(
    node: fx.Node, read: Callable[[fx.Node], fx.Node], build: Build, is_part: bool
) -> Written | None:
    """The functional calls that give what `node` writes, or None where none are known.

    `read` gives the value that an argument holds now; `is_part` says that what is written is copied
    into something larger anyway.
    """
    if node.target is aten.batch_norm.default:
        return _batch_norm(node, read, build)
    if node.target is aten.instance_norm.default:
        return _instance_norm(node, read, build)
    target = functional(node)
    assert isinstance(node.target, torch._ops.OpOverload)
    places = [one.name for one in node.target._schema.arguments if _is_written(one)]
    if len(places) != 1 or (target is None and node.target is not aten.copy_.default):
        return None
    given = arguments(node)
    place = given[places[0]]
    if node.target is aten.copy_.default:
        value = _copied(node, read(place), read(given["src"]), build, is_part)
        return Written({"self": value})
    assert target is not None
    args, kwargs = fx.map_arg((node.args, node.kwargs), read)
    if target is aten.bernoulli.p:  # of which p is no option, as it is in place
        args = (args[0], given["p"])
    kwargs = {name: value for name, value in kwargs.items() if name != _out(node.target)}
    return Written({places[0]: _as_type(place, build(target, *args, **kwargs), build)})


def _copied(node: fx.Node, old: fx.Node, source: fx.Node, build: Build, is_part: bool) -> fx.Node:
    """What `place.copy_(source)` leaves in `place`: in memory and strides of its own, where it
    isn't written into something larger anyway."""
    new, kept = source.meta["val"], node.meta["val"]
    if source is old:
        return old
    same_type = new.dtype == kept.dtype and new.device == kept.device
    if not same_type or not same_sizes(new.shape, kept.shape):
        return build(aten.copy.default, old, source)
    if is_part:
        return source
    strided = same_sizes(new.stride(), kept.stride())
    return build(aten.clone.default, source) if strided else build(aten.copy.default, old, source)


def _as_type(place: fx.Node, value: fx.Node, build: Build) -> fx.Node:
    """`value` in the dtype of the memory that it is written to."""
    dtype = place.meta["val"].dtype
    return value if value.meta["val"].dtype == dtype else build(aten.to.dtype, value, dtype)


def _batch_norm(node: fx.Node, read: Callable[[fx.Node], fx.Node], build: Build) -> Written:
    given = fx.map_arg(arguments(node), read)
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
    results = build(
        aten._native_batch_norm_legit_functional.default,
        *(given[name] for name in names),
        given["eps"],
    )
    item = _items(results, build)
    return Written({"running_mean": item(3), "running_var": item(4)}, item(0))


def _instance_norm(node: fx.Node, read: Callable[[fx.Node], fx.Node], build: Build) -> Written:
    """A running statistic moves towards the mean over the batch of each instance's own."""
    given = fx.map_arg(arguments(node), read)
    x, momentum = build(aten.detach.default, given["input"]), given["momentum"]
    axes = list(range(2, x.meta["val"].ndim))
    pair = _items(build(aten.var_mean.correction, x, axes, correction=1), build)
    values = {}
    for name, statistic in (("running_mean", pair(1)), ("running_var", pair(0))):
        mean = build(aten.mean.dim, statistic, [0])
        mean = _as_type(given[name], mean, build)
        values[name] = build(aten.lerp.Scalar, given[name], mean, momentum)
    stateless = {**given, "running_mean": None, "running_var": None}
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [one.name for one in node.target._schema.arguments]
    return Written(values, build(node.target, *(stateless[name] for name in names)))


def _items(results: fx.Node, build: Build) -> Callable[[int], fx.Node]:
    return lambda index: build(operator.getitem, results, index)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _out(target: torch._ops.OpOverload) -> str | None:
    """The name of the argument that takes the result, as in `torch.add(x, y, out=z)`."""
    names = [one.name for one in target._schema.arguments if one.is_out]
    return names[0] if len(names) == 1 else None


def _without_out(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    wanted = [(one.name, str(one.type)) for one in target._schema.arguments if not one.is_out]
    packet = target.overloadpacket
    for name in packet.overloads():
        overload: torch._ops.OpOverload = getattr(packet, name)
        found = [(one.name, str(one.type)) for one in overload._schema.arguments]
        if found == wanted and not overload._schema.is_mutable:
            return overload
    return None
