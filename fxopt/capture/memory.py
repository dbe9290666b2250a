"""What tensors hold while a graph with writes is walked, so that each write becomes a value.

Tensors that share memory are views of one root. After a write to one of them the root has other
contents; each view is taken of them again when it is next read:

    y = x[1:]; y.add_(1); f(x)   =   y' = x[1:] + 1; x' = slice_scatter(x, y', 1); f(x')

Nothing is decomposed, unlike in torch's own functionalization, which also forgets in which regions
gradients were off. Which tensors share memory is told by the storage of their fake values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Emit: TypeAlias = Callable[..., fx.Node]
"""(operator, arguments, keywords) -> the node that calls it in the graph being built."""

_SHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}
"""Views with all entries of what they look at, in the same order."""

_SAME = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh.default}
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.mT.default, aten.numpy_T.default}
_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}


class UnfollowedError(Exception):
    """A write that this walk can't make a value of: the message says which."""


@dataclass(eq=False)
class Memory:
    """One root and the node that holds its contents after `version` writes."""

    contents: fx.Node
    version: int = 0


@dataclass(eq=False)
class View:
    """A tensor of `memory`: `steps` lead to it from the root; `value` is it as of `version`."""

    memory: Memory
    value: Any
    version: int
    steps: tuple[fx.Node, ...] = ()
    stopped: bool = False
    """Whether it left a region without gradients, so that none flow through it."""


@dataclass
class Memories:
    """The tensors seen so far, as views; `emit` adds a call to the graph that is built.

    `rename` gives the value of an operand of the graph that is walked.
    """

    emit: Emit
    rename: Callable[[Any], Any]
    views: dict[fx.Node, View] = field(default_factory=dict)

    def define(self, node: fx.Node, value: Any) -> None:
        """State that `node` of the walked graph is `value`, computed just now."""
        base = aliased(node)
        if base is None or base not in self.views:
            self.views[node] = View(Memory(value), value, 0)
        else:
            seen = self.views[base]
            self.views[node] = View(
                seen.memory, value, seen.memory.version, (*seen.steps, node), seen.stopped
            )

    def rename_to(self, node: fx.Node, other: fx.Node) -> None:
        """State that `node` is the very tensor `other`."""
        self.views[node] = self.views[other]

    def detach(self, node: fx.Node, other: fx.Node) -> None:
        """State that `node` is the tensor `other` without its gradient."""
        seen = self.views[other]
        value = self.read(other)
        if value.target is not aten.detach.default:
            value = self.emit(aten.detach.default, (value,))
        self.views[node] = View(seen.memory, value, seen.memory.version, seen.steps, True)

    def read(self, node: fx.Node) -> Any:
        """What `node` holds now."""
        view = self.views[node]
        if view.version != view.memory.version:
            view.value = self._taken(view)[-1]
            view.version = view.memory.version
        return view.value

    def write(self, node: fx.Node, value: fx.Node) -> None:
        """State that `node`'s memory was overwritten, where it shows, by `value`.

        Raises `UnfollowedError` where `node` is a view that can't be put back.
        """
        view = self.views[node]
        before = self._taken(view)
        new = value
        for step, base in zip(reversed(view.steps), reversed(before[:-1]), strict=True):
            new = self._put_back(step, base, new)
        view.memory.contents = new
        view.memory.version += 1
        view.value, view.version = value, view.memory.version

    def _taken(self, view: View) -> list[Any]:
        """The contents of the root, and each view on the way to `view`."""
        values: list[Any] = [view.memory.contents]
        for step in view.steps:
            if step.target is operator.getitem:
                values.append(self.emit(operator.getitem, (values[-1], step.args[1])))
                continue
            args, kwargs = fx.map_arg((step.args[1:], step.kwargs), self.rename)
            values.append(self.emit(step.target, (values[-1], *args), kwargs))
        if view.stopped:
            values[-1] = self.emit(aten.detach.default, (values[-1],))
        return values

    def _put_back(self, step: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node:
        """`base` with `new` where the view `step` looks at."""
        target = step.target
        args, kwargs = fx.map_arg((step.args[1:], step.kwargs), self.rename)
        if target in _SAME:
            return new
        if target in _SHAPES:
            return self.emit(aten.reshape_as.default, (new, base))
        if target in _TRANSPOSES:
            return self.emit(target, (new, *args), kwargs)
        if target is aten.permute.default:
            order = [axis % len(args[0]) for axis in args[0]]
            return self.emit(target, (new, [order.index(axis) for axis in range(len(order))]))
        if target in _SCATTERS:
            return self.emit(_SCATTERS[target], (base, new, *args), kwargs)
        raise UnfollowedError(f"{step.name} is a view ({target}) and is written")


def aliased(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the result of `node` shares, by the storages of the fake values."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source if aliased(source) is not None else None
    storages = _storages(node)
    found = [one for one in node.all_input_nodes if storages & _storages(one)]
    return found[0] if found and found[0] is node.args[0] else None


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
