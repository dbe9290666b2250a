"""A graph for inputs of given sizes as a listing: where each node lies, and what is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.executor.arrays import Array, Buffer, Sizes, contiguous, merged
from fxopt.executor.instructions import CONSTANT_BYTES, Function, Kind, Listing, Word, own
from fxopt.nodes import arguments, label

aten, ops = torch.ops.aten, torch.ops.fxopt

ATTENTIONS = (ops.cached_attention.default, ops.int8_cached_attention.default)
"""Attention to a prefix."""
PREFIX = ("past_seen", "past_k", "past_v", "past_k_scale", "past_v_scale")
"""What they are given of it, in the order of an instruction."""
_MOST_AXES = 6
"""`kDimensions` of `executor.h`."""


class NotListedError(Exception):
    """A graph, or inputs of such sizes, that no listing computes; says why."""


@dataclass(frozen=True)
class Prefix:
    """Keys or values of earlier slots, of which only the attention asks where they lie.

    `index` is that of the input, `axes` which of its axes each axis is, -1 for one of size 1.
    """

    index: int
    axes: tuple[int, ...]


Value = Array | Prefix | float | int | bool | None


class Layout:
    """Writes the listing of `graph` for inputs like `inputs`, node by node.

    `held` is the state by name, and which of the tensors that are held each is.
    """

    def __init__(
        self, graph: fx.Graph, held: Mapping[str, tuple[int, Tensor]], inputs: Sequence[Tensor]
    ) -> None:
        self.listing = Listing()
        self.graph = graph
        self._held = held
        self._values: dict[fx.Node, Any] = {}
        self._prefixes = prefixes_of(graph)
        self._sizes: dict[Any, int] = {}
        self._symbols: dict[sympy.Symbol, int] = {}
        self._bind(inputs)

    def _bind(self, inputs: Sequence[Tensor]) -> None:
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, tensor in zip(nodes, inputs, strict=True):
            if node in self._prefixes:
                continue
            if tensor.dtype != node.meta["val"].dtype:
                raise NotListedError(f"{node.name} is {tensor.dtype} in this call")
            for size, given in zip(node.meta["val"].shape, tensor.shape, strict=True):
                if isinstance(size, SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    self._symbols[size.node.expr] = given

    def write(
        self, rules: Mapping[Any, Callable[..., Any]], fused: Mapping[fx.Node, Any]
    ) -> Listing:
        """The listing: nodes of `fused` by that, others by `rules`.

        Raises `NotListedError` where a node has no rule or a rule refuses.
        """
        inputs = 0
        for node in self.graph.nodes:
            if node in fused:
                self._values[node] = None if fused[node] is None else fused[node](self)
            elif node.op == "placeholder":
                self._values[node] = self._input(node, inputs)
                inputs += 1
            elif node.op == "get_attr":
                self._values[node] = self._constant(node)
            elif node.op == "output":
                self._return(node)
            else:
                self._values[node] = self._called(node, rules)
        return self.listing

    def number(self, size: Any) -> int:
        """A size, which may be a symbol or a node, as a number."""
        if isinstance(size, fx.Node):
            size = size.meta["val"]
        if not isinstance(size, SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._sizes:
            value = sympy.sympify(expression.xreplace(self._symbols))
            if not value.is_Integer:
                raise NotListedError(f"a size depends on the prefix or on data: {expression}")
            self._sizes[expression] = int(value)
        return self._sizes[expression]

    def sizes_of(self, node: fx.Node) -> Sizes:
        """The sizes of a node's value."""
        return tuple(self.number(size) for size in node.meta["val"].shape)

    def value(self, argument: Any) -> Any:
        """What an argument is: an array where it is a node with one."""
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def array(self, argument: Any, *dtypes: torch.dtype) -> Array:
        """The array of `argument`, of float32 unless `dtypes` says otherwise."""
        value = self.value(argument)
        if not isinstance(value, Array):
            raise NotListedError(f"{argument} is no tensor of known sizes")
        if value.dtype not in (dtypes or (torch.float32,)):
            raise NotListedError(f"{argument} is {value.dtype}")
        return value

    def maybe_array(self, argument: Any, *dtypes: torch.dtype) -> Array | None:
        """The array of `argument`; None where that is None."""
        return None if argument is None else self.array(argument, *dtypes)

    def constant(self, value: float) -> Array:
        """A float32 without axes, or an int64 where `value` is an int."""
        constants = self.listing.constants
        known = [(type(one), one) for one in constants]
        if (type(value), value) not in known:
            constants.append(value)
            known.append((type(value), value))
        dtype = torch.int64 if isinstance(value, int) else torch.float32
        index = known.index((type(value), value))
        offset = index * CONSTANT_BYTES // dtype.itemsize
        return Array(Buffer("held", len(self._held)), (), (), dtype, offset)

    def map(self, function: Function, sizes: Sizes, *operands: Array) -> Array:
        """A new array of `function` of `operands`, broadcast to `sizes`."""
        result = own(sizes)
        self.map_into(result, function, *operands)
        return result

    def map_into(self, result: Array, function: Function, *operands: Array) -> None:
        """`function` of `operands`, written where `result` lies."""
        self.listing.add(Kind.MAP, int(function), *self.loop(result, *operands))

    def loop(self, *arrays: Array) -> list[Word]:
        """The words of a loop over the entries of arrays, broadcast to the first one's sizes."""
        sizes = arrays[0].sizes
        given = [array.expanded(sizes) for array in arrays]
        runs = merged(sizes, [array.strides for array in given]) or [(1, (0,) * len(given))]
        if len(runs) > _MOST_AXES:
            raise NotListedError(f"{len(runs)} axes that don't lie together")
        words: list[Word] = [len(runs), *(size for size, _ in runs)]
        for index, array in enumerate(given):
            words += [array, *(steps[index] for _, steps in runs)]
        return words

    def rows_loop(self, *arrays: Array) -> list[Word]:
        """The words of a loop over rows, whose last axis is left as it is."""
        sizes = arrays[0].sizes
        given = [array.expanded(sizes) for array in arrays]
        runs = merged(sizes[:-1], [array.strides[:-1] for array in given])
        words: list[Word] = [len(runs) + 1, *(size for size, _ in runs), sizes[-1]]
        for index, array in enumerate(given):
            words += [array, *(steps[index] for _, steps in runs), 1]
        if len(runs) >= _MOST_AXES or any(array.strides[-1] != 1 for array in given):
            raise NotListedError(f"rows of {len(runs)} axes that don't lie together")
        return words

    def dense(self, array: Array) -> Array:
        """`array` itself where its entries lie together, else a copy in which they do."""
        return array if array.is_dense else self.map(Function.COPY, array.sizes, array)

    def rows_dense(self, array: Array) -> Array:
        """`array` with a last axis that lies together."""
        is_row = array.strides[-1] == 1 or array.sizes[-1] == 1
        return array if is_row else self.map(Function.COPY, array.sizes, array)

    def _input(self, node: fx.Node, index: int) -> Value:
        if node in self._prefixes:
            return Prefix(index, tuple(range(node.meta["val"].dim())))
        sizes = self.sizes_of(node)
        _check_entries(node, sizes)
        return Array(Buffer("input", index), sizes, contiguous(sizes), node.meta["val"].dtype)

    def _constant(self, node: fx.Node) -> Array:
        index, tensor = self._held[str(node.target)]
        sizes, expected = tuple(tensor.shape), node.meta["val"]
        if not tensor.is_contiguous():
            raise NotListedError(f"{node.target} isn't contiguous")
        if sizes != tuple(expected.shape) or tensor.dtype != expected.dtype:
            raise NotListedError(f"{node.target} is {tensor.dtype} {sizes} by now")
        return Array(Buffer("held", index), sizes, contiguous(sizes), tensor.dtype)

    def _called(self, node: fx.Node, rules: Mapping[Any, Callable[..., Any]]) -> Any:
        if isinstance(node.meta.get("val"), SymInt | int):
            return None  # sizes are read from their nodes
        rule = rules.get(node.target)
        if rule is None:
            raise NotListedError(f"{label(node)}: no instruction computes {node.target}")
        if isinstance(node.meta["val"], Tensor):
            if _is_of_prefix(self.value(node.args[0]), node):
                return rule(self, node)
            _check_entries(node, self.sizes_of(node))
        try:
            return rule(self, node)
        except NotListedError as error:
            raise NotListedError(f"{label(node)}: {error}") from None

    def _return(self, node: fx.Node) -> None:
        outputs: Any = node.args[0]
        if len(set(outputs)) < len(outputs):
            raise NotListedError("one value is returned twice")
        for index, returned in enumerate(outputs):
            array = self.array(returned)
            if array.buffer.place not in ("own", "result"):
                raise NotListedError(f"{label(returned)} is returned as it was given")
            strides = contiguous(array.sizes)
            output = Array(Buffer("output", index), array.sizes, strides, torch.float32)
            self.map_into(output, Function.COPY, array)
            self.listing.outputs.append(output)


Rule = Callable[[Layout, fx.Node], Any]
"""What a node is in a layout: an array, or several in a list."""


_MOVES = (aten.permute.default, aten.unsqueeze.default)
"""How a prefix is seen otherwise ahead of attention."""


def _is_of_prefix(value: Any, node: fx.Node) -> bool:
    return isinstance(value, Prefix) and node.target in _MOVES


def _check_entries(node: fx.Node, sizes: Sizes) -> None:
    if 0 in sizes:
        raise NotListedError(f"{label(node)} has no entries: {sizes}")


def prefixes_of(graph: fx.Graph) -> frozenset[fx.Node]:
    """The inputs that only attention reads, as the prefix: they may be of any length."""
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    return frozenset(node for node in placeholders if _is_prefix(node) and node.users)


def _is_prefix(node: fx.Node) -> bool:
    return all(_reads_prefix(user, node) for user in node.users)


def _reads_prefix(user: fx.Node, node: fx.Node) -> bool:
    if user.target in _MOVES:
        return _is_prefix(user)
    if user.target in ATTENTIONS:
        given = arguments(user)
        return all(node is not given[name] for name in given.keys() - set(PREFIX))
    return user.target is aten.sym_size.int
