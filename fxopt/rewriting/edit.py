"""Edit: the only hands that touch a graph, on the driver's copy of it.

Every node built here gets its fake value (computed by running the operator on fake tensors, which
also checks the call), and inherits module path and source line from the node it replaces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxopt.constant_expressions import as_recipe
from fxopt.nodes import origins
from fxopt.program import Origin, Program
from fxopt.recipe import Recipe, materialize
from fxopt.rewriting.fake_types import FakeTypes

Made = TypeVar("Made", fx.Node, tuple[fx.Node, ...])


class Edit:
    """A graph under construction: a copy of a program's graph plus new state."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.added: dict[str, Tensor | Recipe] = {}
        self.fetched: set[str] = set()  # the state whose values were asked for since `start`
        self._types = FakeTypes(program.fake_mode)
        self._root: fx.Node | None = None
        self._new: list[fx.Node] = []
        self._stand_ins: list[tuple[fx.Node, fx.Node]] = []
        self._made: dict[Hashable, Any] = {}
        self._names: set[str] = set()
        self._paths: set[str] = set()
        for name in (*program.state, *program.aliases):
            self._take(name)
        self._copy()

    def _copy(self) -> None:
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.program.graph.nodes:
            new = self.graph.node_copy(node, copies.__getitem__)
            new.meta = dict(node.meta)
            copies[node] = new
        first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        assert first is not None
        self._first_operation = first

    def start(self, root: fx.Node) -> None:
        """Begin a rewrite at `root`: new nodes go before it and inherit its origin."""
        self._root, self._new, self._stand_ins = root, [], []
        self.fetched = set()

    @property
    def new_nodes(self) -> list[fx.Node]:
        """What has been built since `start`."""
        return self._new

    @property
    def stand_ins(self) -> list[tuple[fx.Node, fx.Node]]:
        """What `stand_for` was told since `start`."""
        return self._stand_ins

    def stand_for(self, new: fx.Node, old: fx.Node) -> None:
        """Say that `new` has by intent the value of `old`, which isn't what the rule replaces.

        Values are then compared there. int8 may have become uint8, shifted by 128.
        """
        self._stand_ins.append((new, old))

    def call(self, target: torch._ops.OpOverload | Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `target` before the root, typed. Raises `RewriteError` if it can't be typed."""
        assert self._root is not None
        with self.graph.inserting_before(self._root):
            node = self.graph.call_function(target, args, kwargs)
        value = self._types.of_call(target, args, kwargs, self._root)
        node.meta = {**inherited(self._root), "val": value}
        self._new.append(node)
        return node

    def call_by_name(self, target: torch._ops.OpOverload, given: Mapping[str, Any]) -> fx.Node:
        """`call` with what `given` holds under the names of the schema; it may hold more."""
        return self.call(target, *(given[one.name] for one in target._schema.arguments))

    def item(self, value: fx.Node, index: int) -> fx.Node:
        """`value[index]` of an operator with several results."""
        return self.call(operator.getitem, value, index)

    def constant(
        self,
        name: str,
        tensor: Tensor | Recipe,
        *,
        origin: Origin | None = None,
        of: fx.Node | None = None,
    ) -> fx.Node:
        """A new state tensor under `name` (made unique), as a node at the head of the graph.

        `origin` tells the passes after this one what it is. One that is another form of the state
        behind the node `of`, such as a scaled or a rounded one, keeps the origins of that.
        """
        unique = self._unique(name)
        self.added[unique] = tensor
        with self.graph.inserting_before(self._head()):
            node = self.graph.get_attr(unique)
        node.meta = {"val": self._types.of_tensor(tensor), "module_path": "", "source": ""}
        known = () if of is None else origins(of)
        if origin is not None or known:
            node.meta["origins"] = known if origin is None else (*known, origin)
        self._new.append(node)
        return node

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` builds, built once for all roots that ask for it under the same `key`.

        It is built anew where a node of it was erased since, or comes after the present root. Rules
        share the keys of one graph; one that holds the rule is its own.
        """
        made: Made | None = self._made.get(key)
        if made is None or not self._is_at_hand(made):
            made = self._made[key] = make()
        return made

    def _is_at_hand(self, made: fx.Node | tuple[fx.Node, ...]) -> bool:
        assert self._root is not None
        nodes = (made,) if isinstance(made, fx.Node) else made
        return all(not node._erased and node < self._root for node in nodes)

    def state(self, node: fx.Node) -> Tensor | Recipe:
        """The tensor or recipe behind a `get_attr` node, or the recipe of a computed constant."""
        if node.op != "get_attr":
            return as_recipe(node, self.state)
        name = str(node.target)
        self.fetched.add(name)
        return self.added[name] if name in self.added else self.program.state[name]

    def tensor(self, node: fx.Node) -> Tensor:
        """The value behind a `get_attr` node, computed now if it is a recipe."""
        return materialize(self.state(node)).detach()

    def before_erasing(self, node: fx.Node) -> None:
        """Keep the head of the operations valid when its first node goes."""
        if node is self._first_operation:
            self._first_operation = node.next

    def _head(self) -> fx.Node:
        while self._first_operation.prev.op not in ("placeholder", "get_attr", "root"):
            self._first_operation = self._first_operation.prev
        first: fx.Node = self._first_operation
        return first

    def _unique(self, name: str) -> str:
        candidates = (f"{name}_{n}" if n else name for n in range(1 << 20))
        unique = next(candidate for candidate in candidates if self._is_free(candidate))
        self._take(unique)
        return unique

    def _is_free(self, name: str) -> bool:
        """Neither a tensor nor a module may have the name, nor a tensor that of its module."""
        return name not in self._paths and not any(path in self._names for path in _parents(name))

    def _take(self, name: str) -> None:
        self._names.add(name)
        self._paths.update((name, *_parents(name)))


def inherited(node: fx.Node) -> dict[str, Any]:
    """Where a node comes from, as the metadata of a node that takes its place."""
    keys = ("module_path", "source", "nn_module_stack", "stack_trace")
    return {key: node.meta[key] for key in keys if key in node.meta}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
