"""Conversion: one walk over the graph, for passes that change types inside it.

The driver of rules replaces values by others of the same type. What changes types (a width, a
dtype) changes them for everything downstream, so it goes once through the graph in order, onto a
new graph: constants first, then each call on operands that are converted already, typed anew where
any of them changed. Inputs and outputs keep their types. The same division as in MLIR: dialect
conversion beside the greedy driver (https://mlir.llvm.org/docs/DialectConversion).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, fx, nn

from fxopt.errors import RewriteError
from fxopt.graph_text.types import type_text
from fxopt.nodes import constants_below, drop_dead_nodes, label, same_sizes, source_line
from fxopt.program import Changes, Program
from fxopt.recipe import Recipe
from fxopt.rewriting.edit import inherited
from fxopt.rewriting.fake_types import FakeTypes, type_key
from fxopt.rewriting.own_memory import keep_sharing


class Build(Protocol):
    """What makes new nodes, which come from where the converted node is from."""

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call, typed."""

    def constant(self, name: str, tensor: Tensor | Recipe) -> fx.Node:
        """A new state tensor under `name`, made unique."""


class Conversion:
    """What becomes of each constant and each call; by default they stay.

    `fired` is the count that the report shows; where it is None, that of changed constants and
    calls.
    """

    fired: int | None = None

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        """What the state behind `node` becomes, under `name(node)`; `tensor` itself to keep it.

        The result is a parameter where `tensor` is one. Where several nodes read one name, they
        are given the same object.
        """
        return tensor

    def name(self, node: fx.Node) -> str:
        """The state name of what the state behind `node` becomes."""
        return str(node.target)

    def call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
    ) -> fx.Node | None:
        """What `node` becomes: a node made by `build`, an operand, or None.

        `args` and `kwargs` are those of `node` on its new operands. None stands for the same
        target called with them.
        """
        return None


def convert(program: Program, conversion: Conversion, rule: str) -> Program:
    """`program` converted; its `changes` count under `rule`. The same one if nothing changed.

    A node whose target stays keeps its name, and a value keeps its type where no operand's type
    changed. Raises `RewriteError` for a call that can't be typed, for an output whose dtype,
    device or sizes would change, and for a state name that becomes two tensors.
    """
    return _Walk(program, conversion, rule).run()


class _Walk:
    def __init__(self, program: Program, conversion: Conversion, rule: str) -> None:
        self.program = program
        self.conversion = conversion
        self.rule = rule
        self.graph = fx.Graph()
        self.types = FakeTypes(program.fake_mode)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.retyped: set[fx.Node] = set()
        self.converted: dict[str, Tensor | Recipe] = {}
        self.state: dict[str, Tensor | Recipe] = {}
        self.taken: set[str] = set()
        self.calls = 0
        self.first_call: fx.Node | None = None
        self.names = {node.name for node in program.graph.nodes}
        self.unnamed = set(self.names)
        self.numbers: dict[str, int] = {}

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
            else:
                self._copied(node)
        if not self.calls and not self.state:
            return self.program
        keep_sharing(self.program.graph, self.graph, self.rule)
        dead = len(drop_dead_nodes(self.graph, "train"))
        count = self.conversion.fired or self.calls + len(self.state)
        fired = {self.rule: count, **({"dead nodes": dead} if dead else {})}
        alive = set(self.graph.nodes)
        replaced = {
            old.name: new.name
            for old, new in self.copies.items()
            if new in alive and new.name != old.name
        }
        changed = self.program.with_graph(self.graph, self.state)
        changes = self.program.changes.then(Changes(fired, replaced))
        return replace(changed, changes=changes, taken=changed.taken | self.taken)

    def _copied(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, self.copies.__getitem__)
        new.meta = dict(node.meta)
        self.copies[node] = new
        return new

    def _constant(self, node: fx.Node) -> None:
        name = str(node.target)
        old = self.program.state[name]
        given = self.conversion.constant(node, old)
        if self.converted.setdefault(name, given) is not given:
            raise RewriteError(
                f"{self.rule} gives {label(node)} another tensor than an earlier node that reads "
                f"{name} too; convert each state name once and return the same object again"
            )
        new = self._copied(node)
        new.target = self.conversion.name(node)
        if given is old and new.target == name:
            return
        if new.target != name and new.target in self.program.state:
            raise RewriteError(f"{self.rule} renames {name} to {new.target}, which is taken")
        if given is not old:
            self.taken.add(name)
        if new.target not in self.state:
            self.state[new.target] = old if given is old else _like(old, given)
        self._take_type(node, new, self.types.of_tensor(given))

    def _call(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.copies.__getitem__)
        same = type_key((args, kwargs))
        settled = self.retyped.isdisjoint(node.all_input_nodes)

        build = _Build(self, node, same if settled else None)
        known = len(self.state)
        given = self.conversion.call(node, args, kwargs, build)
        if len(self.state) > known:
            self.taken |= constants_below([node])
        new = build(node.target, *args, **kwargs) if given is None else given
        if not isinstance(new, fx.Node) or new.graph is not self.graph:
            raise RewriteError(
                f"{self.rule} returned {new!r} for {label(node)}; return a node made by build, "
                "one of the new operands, or None"
            )
        self.copies[node] = new
        self._take_type(node, new, new.meta["val"])
        self.calls += new.target is not node.target or type_key((new.args, new.kwargs)) != same

    def created(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        name = node.name
        if target is node.target and name in self.unnamed:
            self.unnamed.discard(name)
        else:
            name = self._fresh(target)
        new = self.graph.create_node("call_function", target, args, kwargs, name)
        new.meta = inherited(node)
        self.first_call = self.first_call or new
        return new

    def added(self, name: str, tensor: Tensor | Recipe) -> fx.Node:
        """A constant at the head of the graph, under a name that no other state has."""
        taken = {*self.program.state, *self.program.aliases, *self.state}
        names = (f"{name}_{n}" if n else name for n in range(1 << 20))
        unique = next(one for one in names if one not in taken)
        self.state[unique] = tensor
        with self.graph.inserting_before(self.first_call):
            new = self.graph.get_attr(unique)
        new.meta = {"val": self.types.of_tensor(tensor), "module_path": "", "source": ""}
        return new

    def _fresh(self, target: Any) -> str:
        """A name that no node of either graph has; equal ones are numbered."""
        base = name = str(target.__name__).replace(".", "_")
        while name in self.names:
            self.numbers[base] = self.numbers.get(base, 0) + 1
            name = f"{base}_{self.numbers[base]}"
        self.names.add(name)
        return name

    def _take_type(self, node: fx.Node, new: fx.Node, value: Any) -> None:
        """Note whether the value's type is another; where it isn't, keep the fake value."""
        old = node.meta["val"]
        if value is not old and type_key(value) != type_key(old):
            self.retyped.add(node)
            old = value
        new.meta["val"] = old

    def _output(self, node: fx.Node) -> None:
        new = self._copied(node)
        pairs = zip(node.args[0], new.args[0], strict=True)  # type: ignore[arg-type]
        for index, (old, result) in enumerate(pairs):
            if old in self.retyped:
                self._check_output(index, old, old.meta["val"], result.meta["val"])
        new.meta["val"] = tuple(result.meta["val"] for result in new.args[0])  # type: ignore[union-attr]

    def _check_output(self, index: int, node: fx.Node, old: Tensor, new: Tensor) -> None:
        same = old.dtype == new.dtype and old.device == new.device
        if not same or not same_sizes(old.shape, new.shape):
            line = source_line(node)
            raise RewriteError(
                f"{self.rule} makes output {index}, {label(node)}, a {type_text(new)} where the "
                f"model's is a {type_text(old)}; inputs and outputs keep their types, so leave "
                "the axes and dtypes that reach one as they are"
                + (f"\n  from {line}" if line else "")
            )


@dataclass(frozen=True)
class _Build:
    """`same` keys the type of the converted node's operands, where none of them changed."""

    walk: _Walk
    node: fx.Node
    same: Any

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.walk.created(self.node, target, args, kwargs)
        unchanged = self.same is not None and target is self.node.target
        if unchanged and type_key((args, kwargs)) == self.same:
            new.meta["val"] = self.node.meta["val"]
        else:
            new.meta["val"] = self.walk.types.of_call(target, args, kwargs, self.node)
        return new

    def constant(self, name: str, tensor: Tensor | Recipe) -> fx.Node:
        return self.walk.added(name, tensor)


def _like(old: Tensor | Recipe, new: Tensor | Recipe) -> Tensor | Recipe:
    """`new` as what `old` is: trainable, a frozen parameter, or a buffer."""
    frozen = isinstance(old, nn.Parameter) and not old.requires_grad
    if isinstance(new, Recipe):
        if frozen:
            return replace(new, make=_frozen, sources=(new,), requires_grad=False)
        return replace(new, requires_grad=old.requires_grad)
    if isinstance(old, nn.Parameter) or old.requires_grad:
        return nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    return new.detach()


def _frozen(value: Tensor) -> Tensor:
    return nn.Parameter(value.detach(), requires_grad=False)
