"""A graph with in-place operators as a functional one; no operator is decomposed.

A write gives the written tensor another value. The value moves up into what the tensor is a view of
(see `view_inverses`), and any other view of that memory is taken anew where it is read next. What
is state or an input of the model at the bottom is written at the end of the graph, by `copy_`.
Source: torch's functionalization (`torch.func.functionalize`), which decomposes on the way.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.capture.view_inverses import View, parent_after
from fxopt.capture.writes import changes_shape, functional, writes, written
from fxopt.errors import CaptureError
from fxopt.nodes import same_sizes
from fxopt.sharing import chain

aten = torch.ops.aten


class UnknownWriteError(CaptureError):
    """A write that has no functional form here."""


def functionalized(graph: fx.Graph, aliases: Mapping[fx.Node, fx.Node]) -> fx.Graph:
    """`graph` without writes but `copy_` to state and inputs at its end.

    `aliases` names, for each node whose result shares memory with an operand, that operand. Raises
    `UnknownWriteError` for an operator, or a view under it, that has no functional form here.
    """
    if not any(map(writes, graph.nodes)):
        return graph
    return _Walk(aliases).run(graph)


class _Walk:
    """Old nodes stand for the tensors of the run; `values` holds what they are in the new graph.

    `current[x]` is the tensor that `x` is by now: `x.add_(y)` returns x itself, and after
    `x.unsqueeze_(0)` the name x means the unsqueezed view.
    """

    def __init__(self, aliases: Mapping[fx.Node, fx.Node]) -> None:
        self.aliases = aliases
        self.graph = fx.Graph()
        self.current: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, View] = {}
        self.values: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, fx.Node] = {}
        self.read_at: Counter[fx.Node] = Counter()
        self.writes: Counter[fx.Node] = Counter()
        self.written: frozenset[fx.Node] = frozenset()
        self.at: fx.Node | None = None

    def run(self, graph: fx.Graph) -> fx.Graph:
        self.written = _written_memory(graph, self.aliases)
        for node in graph.nodes:
            self.at = node
            if node.op == "output":
                self._finish(node)
            elif not writes(node):
                self._copy(node)
            elif changes_shape(node):
                self._change_shape(node)
            else:
                self._write(node)
        return self.graph

    def _copy(self, node: fx.Node) -> None:
        twin = self._same_view(node)
        if twin is not None:
            self.current[node] = twin
            return
        new = self.graph.node_copy(node, self._read)
        new.meta = dict(node.meta)
        operand = self.aliases.get(node)
        if operand is not None:
            self._view(node, node.target, node.args, operand)
            if node.target is aten.as_strided.default and self._base(node) in self.written:
                raise self._unknown(node)  # it reads memory by places, which a new value moves
        self._hold(node, new)
        if node.op in ("placeholder", "get_attr"):
            self.places[node] = new

    def _view(self, node: fx.Node, target: Any, args: tuple[Any, ...], operand: fx.Node) -> None:
        parent = self._named(operand)
        if target is operator.getitem and parent in self.views:
            parent = self.views[parent].parent  # the tensor whose pieces the list holds
        self.views[node] = View(target, args, dict(node.kwargs), operand, parent)

    def _same_view(self, node: fx.Node) -> fx.Node | None:
        """The view that `node` takes a second time, as `x[0] += y` does, of memory that is written:
        both are one tensor."""
        operand = self.aliases.get(node)
        if operand is None or self._base(self._named(operand)) not in self.written:
            return None
        parent, args = self._named(operand), fx.map_arg(node.args, self._named)
        for view in self.views:
            known = self.views[view]
            same = known.parent is parent and known.target is node.target
            if same and not node.kwargs and not known.kwargs and self._args(known) == args:
                return view
        return None

    def _args(self, view: View) -> Any:
        return fx.map_arg(view.args, self._named)

    def _hold(self, node: fx.Node, value: fx.Node) -> None:
        self.values[node] = value
        self.read_at[node] = self.writes[self._base(node)]

    def _named(self, node: fx.Node) -> fx.Node:
        """The tensor that the name of `node` means by now."""
        while node in self.current:
            node = self.current[node]
        return node

    def _base(self, tensor: fx.Node) -> fx.Node:
        while tensor in self.views:
            tensor = self.views[tensor].parent
        return tensor

    def _read(self, node: fx.Node) -> fx.Node:
        return self._value(self._named(node))

    def _value(self, tensor: fx.Node) -> fx.Node:
        """What a tensor holds; a view of memory that was written since is taken anew."""
        if self.read_at[tensor] != self.writes[self._base(tensor)]:
            view = self.views[tensor]

            def now(used: fx.Node) -> fx.Node:
                if used is not view.operand or view.target is operator.getitem:
                    return self._read(used)
                return self._value(view.parent)

            args, kwargs = fx.map_arg((view.args, view.kwargs), now)
            new = self.graph.call_function(view.target, args, kwargs)
            new.meta = dict(tensor.meta)
            self._hold(tensor, new)
        return self.values[tensor]

    def _change_shape(self, node: fx.Node) -> None:
        """`x.unsqueeze_(0)`: the name x means a view of what it meant."""
        target, name = functional(node), node.args[0]
        if target is None or not isinstance(name, fx.Node):
            raise self._unknown(node)
        self._view(node, target, node.args, name)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._read)
        self._hold(node, self._build(target, *args, **kwargs))
        self.current[self.views[node].parent] = node

    def _write(self, node: fx.Node) -> None:
        place = node.args[0]
        is_part = isinstance(place, fx.Node) and self._is_part(self._named(place))
        found = written(node, self._read, self._build, is_part)
        if found is None:
            raise self._unknown(node)
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        names = [one.name for one in schema]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        for name, value in found.values.items():
            tensor = self._named(given[name])
            if value is not self._value(tensor):
                self._give(tensor, value)
        if found.result is not None:
            self._hold(node, found.result)
        else:
            (name,) = found.values
            self.current[node] = self._named(given[name])

    def _is_part(self, tensor: fx.Node) -> bool:
        """Whether what is written to `tensor` is copied into something larger, or to a place."""
        base = self._base(tensor)
        if tensor is base or base in self.places:
            return tensor is not base
        if not _is_tensor(base):  # `torch.where(mask)` gives columns of one matrix
            return True
        counts = [one.meta["val"].numel() for one in (tensor, base)]
        return not same_sizes(counts[:1], counts[1:])

    def _give(self, tensor: fx.Node, value: fx.Node) -> None:
        """`tensor` has another value, and what it is a view of with it."""
        path = [tensor]
        while path[-1] in self.views:
            path.append(self.views[path[-1]].parent)
        before = [self._value(one) for one in path]
        self.writes[path[-1]] += 1
        for one, parent, old in zip(path, [*path[1:], None], [*before[1:], None], strict=True):
            self._hold(one, value)
            if parent is None or old is None:
                continue
            above = parent_after(self.views[one], old, value, self._read, self._build)
            if above is None:
                raise self._unknown(one)
            value = above

    def _build(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `target`, typed, that comes from the line that is being read."""
        assert self.at is not None
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda used: used.meta["val"])
        fakes = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor))
        mode = next(fakes).fake_mode if target is not operator.add else None
        if mode is None:
            value = target(*values[0])
        else:
            with mode, torch.no_grad(), enable_python_dispatcher():
                value = target(*values[0], **values[1])
        node.meta = {**self.at.meta, "val": value}
        return node

    def _finish(self, output: fx.Node) -> None:
        """Each output is in the memory that it was in: a view of what was written is taken anew of
        what that holds, and of an input or of state after the write to it."""
        tensors = [self._named(result) for result in output.all_input_nodes]
        sharers = Counter(map(self._base, dict.fromkeys(tensors)))
        for tensor in tensors:
            base = self._base(tensor)
            value = self._value(base)
            if base in self.places or not self.writes[base] or not _is_tensor(base):
                continue
            if sharers[base] > 1 and len(chain(value)) > 1:
                # A view of something written anew; compiled code would compute each view apart.
                self.at = value
                self._move(base, self._build(aten.clone.default, value))
            elif not _share(self._value(tensor), value):
                self._move(base, value)
        fx.map_arg(output.args, self._read)
        for place, first in self.places.items():
            value = self._value(place)
            if value is not first:
                new = self.graph.call_function(aten.copy_.default, (first, value))
                origin = {key: value.meta.get(key, "") for key in ("module_path", "source")}
                new.meta = {"val": place.meta["val"], **origin}
                self._move(place, new)
        self.graph.output(*fx.map_arg(output.args, self._read)).meta = dict(output.meta)

    def _move(self, base: fx.Node, value: fx.Node) -> None:
        """The memory that `base` made is that of `value`: its views are taken anew, of that."""
        self.writes[base] += 1
        self._hold(base, value)

    def _unknown(self, node: fx.Node) -> UnknownWriteError:
        return UnknownWriteError(
            f"{node.target} writes to memory in a way that has no functional form, at "
            f"{node.meta.get('source') or 'an unknown line'}. Write it out of place, as "
            "x = f(x) or with torch.where."
        )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _share(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are in one memory."""
    return chain(one)[-1] is chain(other)[-1]


def _written_memory(graph: fx.Graph, aliases: Mapping[fx.Node, fx.Node]) -> frozenset[fx.Node]:
    """The nodes that made memory which some operator that writes is given."""
    base: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        operand = aliases.get(node)
        if writes(node):
            written.update(base[used] for used in node.all_input_nodes)
        base[node] = node if operand is None else base[operand]
    return frozenset(written)
