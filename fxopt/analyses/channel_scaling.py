"""Where a scale per channel of a value can be absorbed by what computes the value.

A value is scaled for free if its producer has a factor per channel of its own, and nothing but the
readers in question sees the change:

    layer_norm(x, w, b) * s      =  layer_norm(x, w * s, b * s)          (and rms_norm)
    (w * y) * s                  =  (w * s) * y                          w a constant vector
    (x @ Wᵀ + b) * s             =  x @ (s[:, None] * W)ᵀ + b * s
    relu(y) * s                  =  relu(y * s)                          s > 0
    (a * b) * s                  =  a * (b * s)
    softmax(q kᵀ) (v * s)        =  (softmax(q kᵀ) v) * s                s per column of v
    view(y) * s                  =  view(y * s')                         s' follows the elements

The walk goes up from the value. Channels are followed through views as an index: which channel of
the value each position along the current axes belongs to. Where an expand repeats elements (the
key/value heads of grouped-query attention), the channels that meet in one element are tied.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxopt.analyses.view_axes import Layout, is_view, through_view
from fxopt.nodes import label, same_sizes
from fxopt.operators.casts import CASTS, UNCHANGED
from fxopt.operators.linears import as_linear, refuse_shared_weight
from fxopt.operators.views import PARTS

aten = torch.ops.aten

SCALED_NORMS = {aten.layer_norm.default: 2, aten.rms_norm.default: 1}
"""Norms with a weight (and a bias): how many constants per channel they take after the shape."""

_HOMOGENEOUS = (
    aten.relu.default,
    aten.leaky_relu.default,
    aten.neg.default,
    *UNCHANGED,
    *CASTS,
    aten.mul.Scalar,
    aten.div.Scalar,
)
_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Absorption:
    """What absorbs a scale per channel [K] of a value.

    `producer` takes factor `channels[n]` for its channel n (-1: factor 1). `path` are the nodes
    from there down to the value, both ends left out at the top and kept at the bottom. `ties` [K]
    gives equal numbers to channels that must share one factor. `siblings` are other results of a
    split on the path; they keep their values.
    """

    producer: fx.Node
    channels: Tensor
    ties: Tensor
    path: tuple[fx.Node, ...] = ()
    siblings: tuple[fx.Node, ...] = ()


def find_absorption(value: fx.Node, readers: Collection[fx.Node]) -> Absorption | str:
    """What absorbs a scale per channel (last axis) of `value`, all of whose `readers` compensate.

    The reason if there is nothing: another reader, an input, an operator that isn't homogeneous.
    """
    for view in filter(is_view, readers):
        other = _other_reader(view, readers)
        if other is not None:
            return other
    return _absorb(value, Layout.of_last_axis(value), readers)


def view_source(x: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The value that `x` is a view of with the same last axis, and the views, upstream first."""
    views: list[fx.Node] = []
    layout = Layout.of_last_axis(x)
    while is_view(x):
        source = x.args[0]
        up = through_view(x, layout)
        assert isinstance(source, fx.Node)
        if isinstance(up, str) or not up.is_last_axis_of(source, layout.index):
            break
        views.append(x)
        x, layout = source, up
    return x, tuple(reversed(views))


def _absorb(value: fx.Node, layout: Layout, readers: Collection[fx.Node]) -> Absorption | str:
    other = _other_reader(value, readers)
    if other is not None:
        return other
    if value.op != "call_function":
        kind = "an input of the model" if value.op == "placeholder" else "a constant"
        return f"{label(value)} is {kind}"
    producer = _as_producer(value, layout)
    if producer is not None:
        return producer
    reason = f"{_operator(value)} can't take a scale per channel ({label(value)})"
    for source, up in _sources(value, layout):
        if isinstance(up, str):
            reason = up
            continue
        found = _follow(value, source, up)
        if isinstance(found, Absorption):
            return found
        reason = found
    return reason


def _other_reader(value: fx.Node, readers: Collection[fx.Node]) -> str | None:
    other = next((user for user in value.users if user not in readers), None)
    if other is None:
        return None
    if other.op == "output":
        return f"{label(value)} is an output of the model"
    return f"{label(other)} reads {label(value)} too"


def _follow(value: fx.Node, source: fx.Node, up: Layout) -> Absorption | str:
    if value.target is not operator.getitem:
        if _occurrences(source, value) != 1:
            return f"{label(value)} reads {label(source)} twice"
        found = _absorb(source, up, (value,))
        return found if isinstance(found, str) else replace(found, path=(*found.path, value))
    split = value.args[0]
    assert isinstance(split, fx.Node)
    siblings = tuple(user for user in split.users if user is not value)
    if any(sibling.args[1] == value.args[1] for sibling in siblings):
        return f"another node takes {label(value)} from {label(split)} too"
    found = _absorb(source, up, (split,))
    if isinstance(found, str):
        return found
    if found.siblings:
        return f"{label(value)} is a part of a part"
    return replace(found, path=(*found.path, split, value), siblings=siblings)


def _as_producer(value: fx.Node, layout: Layout) -> Absorption | str | None:
    """`value` itself if it has a constant factor per channel; why it can't be changed if so."""
    if layout.axes != (value.meta["val"].ndim - 1,):
        return None
    linear = as_linear(value)
    if linear is not None:
        if not linear.dtype.is_floating_point:
            return f"the weight of {label(value)} is {linear.dtype}"
        reason = refuse_shared_weight(linear, lambda user: _leads_only_to(user, value))
        if reason is not None:
            return f"{label(value)} can't be scaled: {reason}"
    elif not (_is_norm(value) or constant_factor(value) is not None):
        return None
    return Absorption(value, layout.index, layout.ties)


def _is_norm(value: fx.Node) -> bool:
    count = SCALED_NORMS.get(value.target)  # type: ignore[call-overload]
    if count is None or value.kwargs or len(value.args[1]) != 1:  # type: ignore[arg-type]
        return False
    constants = value.args[2 : 2 + count]
    return all(c is None or (isinstance(c, fx.Node) and c.op == "get_attr") for c in constants)


def constant_factor(value: fx.Node) -> fx.Node | None:
    """The vector over the last axis, the same for all inputs, in `value` = mul(vector, y)."""
    if value.target is not aten.mul.Tensor:
        return None
    tensor = value.meta["val"]
    for operand in value.args:
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], Tensor):
            continue
        vector = operand.meta["val"]
        leading = [1] * (vector.ndim - 1)
        if (
            vector.dtype == tensor.dtype
            and same_sizes(vector.shape, (*leading, tensor.shape[-1]))
            and _is_constant(operand)
        ):
            return operand
    return None


def _is_constant(node: fx.Node, steps: int = 8) -> bool:
    """Whether `node` is state, or a few steps from it, such as Gemma's 1 + weight."""
    if node.op == "get_attr":
        return True
    operands = node.all_input_nodes
    return (
        steps > 0
        and node.op == "call_function"
        and bool(operands)
        and all(_is_constant(operand, steps - 1) for operand in operands)
    )


def _sources(value: fx.Node, layout: Layout) -> Iterator[tuple[fx.Node, Layout | str]]:
    """The operands that `value` is homogeneous in, each with the channels as they lie there."""
    if is_view(value):
        yield _node(value.args[0]), through_view(value, layout)
    elif value.target in _HOMOGENEOUS:
        source = _node(value.args[0])
        # On the other side of a cast a scaled value is rounded to other bits.
        if source.meta["val"].dtype == value.meta["val"].dtype:
            yield source, layout
    elif value.target in (aten.mul.Tensor, aten.div.Tensor):
        operands = value.args if value.target is aten.mul.Tensor else value.args[:1]
        for operand in operands:
            if isinstance(operand, fx.Node) and isinstance(operand.meta["val"], Tensor):
                yield operand, _elementwise(operand, value, layout)
    elif value.target is operator.getitem:
        split = _node(value.args[0])
        if split.target in PARTS:
            yield _node(split.args[0]), _of_part(value, split, layout)
    elif value.target is _ATTENTION:
        yield _node(value.args[2]), _attention_value(value, layout)
    elif value.target in _PRODUCTS:
        right = value.args[1]
        if isinstance(right, fx.Node):
            yield right, _columns(value, right, layout)


def _elementwise(operand: fx.Node, value: fx.Node, layout: Layout) -> Layout | str:
    if same_sizes(operand.meta["val"].shape, value.meta["val"].shape):
        return layout
    return f"{label(operand)} is broadcast in {label(value)}"


def _of_part(value: fx.Node, split: fx.Node, layout: Layout) -> Layout | str:
    """The channels of one result of a split, in what is split."""
    whole = _node(split.args[0]).meta["val"]
    index = value.args[1]
    default = 0
    at = 1 if split.target is aten.unbind.int else 2
    axis = split.kwargs.get("dim", split.args[at] if len(split.args) > at else default)
    if not isinstance(axis, int) or not isinstance(index, int):
        return f"{label(split)} is not understood"
    axis %= whole.ndim
    if split.target is aten.unbind.int:
        return layout.with_axis(axis, int(whole.shape[axis]), index)
    if axis not in layout.axes:
        return f"{label(split)} splits another axis than the channels'"
    before = sum(int(part.shape[axis]) for part in split.meta["val"][:index])
    return layout.padded(axis, before, int(whole.shape[axis]))


def _attention_value(value: fx.Node, layout: Layout) -> Layout | str:
    """The channels of attention's output in its value operand [..., heads, length, channels]."""
    operand = _node(value.args[2])
    out, rank = layout, value.meta["val"].ndim
    if value.kwargs.get("enable_gqa") or (len(value.args) > 7 and value.args[7]):
        grouped = out.split_repeats(rank - 3, operand.meta["val"].shape[-3])
        if isinstance(grouped, str):
            return grouped
        out = grouped
    return _columns(value, operand, out)


def _columns(value: fx.Node, right: fx.Node, layout: Layout) -> Layout | str:
    """The channels of `left @ right` in `right`: any axis but the rows that are summed over."""
    have, want = right.meta["val"], value.meta["val"]
    if have.ndim != want.ndim or want.ndim - 2 in layout.axes:
        return f"the channels of {label(value)} are not columns of one operand"
    if not same_sizes([have.shape[axis] for axis in layout.axes], layout.index.shape):
        return f"{label(right)} is broadcast in {label(value)}"
    return layout


def _leads_only_to(user: fx.Node, value: fx.Node) -> bool:
    """Whether a reader of a weight is `value`, or a transposition that only `value` reads."""
    return user is value or (is_view(user) and all(inner is value for inner in user.users))


def _occurrences(source: fx.Node, value: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((value.args, value.kwargs), found.append)
    return found.count(source)


def _operator(value: fx.Node) -> str:
    return str(value.target).removeprefix("aten.").partition(".")[0]


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
