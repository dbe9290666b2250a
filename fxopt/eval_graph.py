"""The graph that a train-mode program computes in evaluation mode, derived from it by rewriting.

    dropout(x)                            =  x
    x * (bernoulli(q) / q)                =  x      what torch and others write dropout out as
    attention(q, k, v, dropout_p=p)       =  attention(q, k, v, dropout_p=0)
    lstm(..., train=True)                 =  lstm(..., train=False)
    batch_norm(x, batch statistics)       =  batch_norm(x, running statistics)
    running statistic <- its update       =  nothing

Everything else is the same in both modes, as far as a training graph can tell: a random operator
that is no dropout stays, and dropout that a model keeps on in evaluation is switched off with all
the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxopt.nodes import draws_random, drop_dead_nodes, label, same_sizes
from fxopt.operators.dropout import DROPOUT
from fxopt.program import Program
from fxopt.wellformed import check

aten = torch.ops.aten

_TRAINING_FLAG: Mapping[Any, str] = MappingProxyType(
    {
        aten.lstm: "train",
        aten.gru: "train",
        aten.rnn_tanh: "train",
        aten.rnn_relu: "train",
        aten.rrelu: "training",
    }
)
_MUL = (aten.mul.Tensor, aten.mul.Scalar)
_DIV = (aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class _BatchNorm:
    """Where a batch norm on batch statistics has its momentum, and which results are updates.

    Input, weight, bias, running mean and running variance are its first five arguments.
    """

    momentum: int
    updates: Mapping[int, int]
    """Index of a result -> index of the running statistic that it updates."""


_BATCH_NORMS: Mapping[Any, _BatchNorm] = MappingProxyType(
    {
        aten._native_batch_norm_legit_functional.default: _BatchNorm(6, {3: 3, 4: 4}),
        aten._batch_norm_with_update_functional.default: _BatchNorm(5, {4: 3, 5: 4}),
    }
)


def evaluation_mode(program: Program) -> Program:
    """What the model of a train-mode `program` computes in evaluation mode, over the same tensors.

    A program captured in eval mode is returned as it is. Nodes that still draw random numbers are
    named in the result's `notes`.
    """
    return in_evaluation_mode(program)[0]


def in_evaluation_mode(program: Program) -> tuple[Program, Callable[[fx.Node], fx.Node]]:
    """`evaluation_mode(program)`, and which of its nodes has the value of one of `program`'s."""
    if program.mode == "eval":
        return program, lambda node: node
    derivation = _Derivation(program)
    drop_dead_nodes(derivation.graph)
    notes = (*program.notes, *_random_left(derivation.graph))
    result = replace(program.with_graph(derivation.graph), mode="eval", notes=notes)
    check(result)
    return result, derivation.new.__getitem__


def without_dropout(program: Program) -> Program:
    """`program` in its own mode with every dropout switched off: with what can be compared where
    two programs draw other numbers."""
    return replace(evaluation_mode(replace(program, mode="train")), mode=program.mode)


class _Derivation:
    """One walk over a training graph that builds the evaluation graph node by node."""

    def __init__(self, program: Program) -> None:
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.counters: set[str] = set()
        for node in program.graph.nodes:
            if self._is_training_write(node):
                self.new[node] = self._value(node, 0)
            else:
                self.new[node] = self._derived(node)

    def _derived(self, node: fx.Node) -> fx.Node:
        target = node.target
        if target in DROPOUT:
            return self._value(node, 0)
        if target in _BATCH_NORMS and _is_plain(node):
            return self._batch_norm(node, _BATCH_NORMS[target])
        if target is operator.getitem:
            return self._item(node)
        if target in _MUL:
            kept = _undropped(node)
            if kept is not None:
                return self._cast(self.new[kept], node)
        return self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, self.new.__getitem__)
        new.meta = dict(node.meta)
        if isinstance(new.target, torch._ops.OpOverload):
            flag = _TRAINING_FLAG.get(new.target.overloadpacket)
            if flag is not None:
                _set(new, flag, False)
            _set(new, "dropout_p", 0.0)
        return new

    def _batch_norm(self, node: fx.Node, kind: _BatchNorm) -> fx.Node:
        operands = [None if arg is None else self.new[arg] for arg in node.args[:5]]  # type: ignore[index]
        mean = operands[3]
        if mean is not None and mean.op == "get_attr":
            path, dot, _ = str(mean.target).rpartition(".")
            self.counters.add(f"{path}{dot}num_batches_tracked")
        momentum, epsilon = node.args[kind.momentum : kind.momentum + 2]
        args = (*operands, False, momentum, epsilon, False)
        new = self.graph.call_function(aten.batch_norm.default, args)
        new.meta = {**node.meta, "val": node.meta["val"][0]}
        return new

    def _item(self, node: fx.Node) -> fx.Node:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source.target is aten.native_dropout.default:
            return self._kept_by_dropout(node, source, index)
        if self.new[source].target is aten.batch_norm.default and source.target in _BATCH_NORMS:
            statistic = _BATCH_NORMS[source.target].updates.get(index)
            return self.new[source] if statistic is None else self._value(source, statistic)
        return self._copy(node)

    def _kept_by_dropout(self, node: fx.Node, dropout: fx.Node, index: int) -> fx.Node:
        if index == 0:
            return self._value(dropout, 0)
        everything = self.graph.call_function(
            aten.ones_like.default, (self._value(dropout, 0),), {"dtype": torch.bool}
        )
        everything.meta = dict(node.meta)
        return everything

    def _cast(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """`value` in the dtype that the product with a mask had."""
        wanted = like.meta["val"]
        if value.meta["val"].dtype == wanted.dtype:
            return value
        new = self.graph.call_function(aten.to.dtype, (value, wanted.dtype))
        new.meta = dict(like.meta)
        return new

    def _value(self, node: fx.Node, index: int) -> fx.Node:
        operand = node.args[index]
        assert isinstance(operand, fx.Node)
        return self.new[operand]

    def _is_training_write(self, node: fx.Node) -> bool:
        """Whether `node` writes a running statistic (its update is by now itself) or counts."""
        if node.target is not aten.copy_.default:
            return False
        written = self._value(node, 0)
        return self._value(node, 1) is written or str(written.target) in self.counters


def _is_plain(norm: fx.Node) -> bool:
    """Whether nothing but the output and the updated statistics of a batch norm is read."""
    known = {0, *_BATCH_NORMS[norm.target].updates}
    return all(user.args[1] in known for user in norm.users if user.users)


def _undropped(product: fx.Node) -> fx.Node | None:
    """x where `product` is x times a drawn mask over the mask's mean; None where it isn't.

    Written x * (mask / q), as torch and torchvision do, or (x / q) * mask, as transformers does.
    """
    for x, other in (product.args[:2], product.args[1::-1]):
        if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
            continue
        if other.target in _DIV and _is_draw(other.args[0], other.args[1]):
            kept: Any = x
        elif x.target in _DIV and _is_draw(other, x.args[1]):
            kept = x.args[0]
        else:
            continue
        if same_sizes(kept.meta["val"].shape, product.meta["val"].shape):
            return kept  # type: ignore[no-any-return]
    return None


def _is_draw(node: Any, rate: Any) -> bool:
    """Whether `node` is a fresh mask of ones, with probability `rate`, and zeros."""
    if not isinstance(node, fx.Node) or not isinstance(rate, float):
        return False
    if node.target is aten.bernoulli.p:
        return bool(node.args[1] == rate)
    if node.target is not aten.floor.default:
        return False
    total = node.args[0]
    return (
        isinstance(total, fx.Node)
        and total.target is aten.add.Tensor
        and bool(total.args[1] == rate)
        and isinstance(total.args[0], fx.Node)
        and total.args[0].target in (aten.rand.default, aten.rand_like.default)
    )


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Give the argument `name` of a call another value, wherever it stands; none if it has none."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    names = [argument.name for argument in arguments]
    if name not in names:
        return
    index = names.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    elif name in node.kwargs:
        node.update_kwarg(name, value)


def _random_left(graph: fx.Graph) -> list[str]:
    """A note on the operators that still draw; empty where none does."""
    drawing = [
        label(node)
        for node in graph.nodes
        if draws_random(node)
        and node.target.overloadpacket not in _TRAINING_FLAG
        and all(argument.name != "dropout_p" for argument in node.target._schema.arguments)
    ]
    if not drawing:
        return []
    more = f" and {len(drawing) - 3} more" if len(drawing) > 3 else ""
    return [
        f"in evaluation mode too, random numbers are drawn at {', '.join(drawing[:3])}{more}: the "
        "training graph doesn't tell whether the model switches them off"
    ]
