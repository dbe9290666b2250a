"""Program: the frozen value that walks through the house.

A program is a graph in the one dialect, the tensors its `get_attr` nodes name, and the calling
convention of the model it came from. Passes take one and return another; nothing edits one in
place. Tensors that no pass touches are the model's own, shared and never copied.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.calibration import Calibration
from fxopt.errors import FxoptError
from fxopt.signature import Signature

Mode = Literal["eval", "train"]

UNKNOWN_SIZE = 64
"""What a cost is estimated for where a size depends on data that nobody has seen."""


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is: the reason and the node (its module path and name)."""

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class Recipe:
    """A tensor that isn't computed yet: `make(*sources)`, of known shape and dtype.

    Fusing three weights and then quantizing the result needs the fused floats for a moment only;
    a recipe holds the sources, which are shared with the model, instead of their concatenation.
    """

    make: Callable[..., Tensor]
    sources: tuple[Tensor | Recipe, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    def materialize(self) -> Tensor:
        """Compute the tensor; a `Parameter` when its sources were trainable."""
        with torch.no_grad():
            value = self.make(*(materialize(source) for source in self.sources))
        return torch.nn.Parameter(value) if self.requires_grad else value


@dataclass(frozen=True)
class Changes:
    """What the rewriting driver did to make a program from its predecessor; only it writes this.

    `fired` counts firings by rule; `replaced` pairs each replaced node's name in the predecessor
    with the node that now holds its value; `refused` says what was left alone.
    """

    fired: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()

    def then(self, later: Changes) -> Changes:
        """These changes followed by `later` ones."""
        counts = Counter(self.fired)
        counts.update(later.fired)
        replaced = {old: later.replaced.get(new, new) for old, new in self.replaced.items()}
        refused = dict.fromkeys((*self.refused, *later.refused))
        return Changes(dict(counts), {**later.replaced, **replaced}, tuple(refused))


@dataclass(frozen=True)
class Program:
    """A captured model: `graph` over `state`, called as `signature` says.

    `state` maps each `get_attr` target to its tensor (or recipe); `aliases` maps further names of a
    tied tensor to the one in `state`; `module_types` gives the class name of each module path, for
    printing; `example` holds the graph's input tensors at capture; `notes` what the user must know;
    `changes` what the driver did to it since the step began; `calibration` holds the inputs that
    the user gave for learning ranges, while passes run; `pruned` counts the channels that groups
    had before their least important ones were cut; `taken` names the state from which passes have
    derived other state, so that writing to it by now would be seen in part.
    """

    graph: fx.Graph
    state: Mapping[str, Tensor | Recipe]
    signature: Signature
    example: tuple[Tensor, ...]
    mode: Mode = "eval"
    name: str = "Model"
    aliases: Mapping[str, str] = field(default_factory=dict)
    non_persistent: frozenset[str] = frozenset()
    module_types: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    changes: Changes = Changes()
    calibration: Calibration | None = None
    pruned: Mapping[str, int] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("state", "aliases", "module_types", "pruned"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in calling order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; its argument is a flat tuple of nodes."""
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that all `meta["val"]` of this program belong to."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise FxoptError("the program holds no tensor at all; there is nothing to optimise")

    @functools.cached_property
    def written(self) -> frozenset[str]:
        """The names of the state that a call writes: running statistics, counters."""
        return frozenset(
            str(node.args[0].target)
            for node in self.graph.nodes
            if node.target is torch.ops.aten.copy_.default and node.args[0].op == "get_attr"
        )

    @functools.cached_property
    def learning(self) -> frozenset[str]:
        """The names of the state that training changes: none of a program in eval mode."""
        if self.mode == "eval":
            return frozenset()
        return frozenset(name for name, tensor in self.state.items() if tensor.requires_grad)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `node` is state that no training and no call changes."""
        is_state = node.op == "get_attr" and self.mode == "eval"
        return is_state and str(node.target) not in self.written

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The input tensors of each calibration batch, or of the example where none were given."""
        if self.calibration is None:
            yield self.example
        else:
            yield from self.calibration.batches()

    def tensor(self, name: str) -> Tensor:
        """The tensor that `get_attr` target `name` stands for, computed now if it is a recipe."""
        return materialize(self.state[name])

    def with_graph(
        self, graph: fx.Graph, added: Mapping[str, Tensor | Recipe] | None = None
    ) -> Program:
        """This program with another graph, with `added` state, without state nobody reads."""
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        state = {name: t for name, t in {**self.state, **(added or {})}.items() if name in used}
        aliases = {name: kept for name, kept in self.aliases.items() if kept in state}
        return replace(self, graph=graph, state=state, aliases=aliases)

    def materialized(self) -> Program:
        """This program with every recipe computed, one after the other."""
        state = {name: materialize(tensor) for name, tensor in self.state.items()}
        return replace(self, state=state)

    def outline(self) -> Program:
        """This program with its tensors on the meta device: all that printing needs."""
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self.state.items()
        }
        return replace(self, state=state, example=(), calibration=None)

    def on_device(self, device: torch.device) -> Program:
        """This program for inputs on `device`: device arguments, fake values and signature moved.

        The caller moves the state.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, FakeTensor) else value

        with self.fake_mode:
            for node in self.graph.nodes:
                new = graph.node_copy(node, copies.__getitem__)
                new.args, new.kwargs = pytree.tree_map_only(
                    torch.device, lambda _: device, (new.args, new.kwargs)
                )
                new.meta = {**node.meta, "val": pytree.tree_map(moved, node.meta["val"])}
                copies[node] = new
        example = tuple(tensor.to(device) for tensor in self.example)
        return replace(
            self,
            graph=graph,
            signature=self.signature.on_device(device),
            example=example,
            calibration=None,
        )

    def parameter_bytes(self) -> int:
        """Bytes of all state tensors, tied ones counted once."""
        return sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in self.state.values())

    def node_count(self) -> int:
        """Number of operations: nodes that compute, without inputs, constants and output."""
        return sum(node.op == "call_function" for node in self.graph.nodes)


def materialize(tensor: Tensor | Recipe) -> Tensor:
    """The tensor itself, or what its recipe computes."""
    return tensor.materialize() if isinstance(tensor, Recipe) else tensor


def module_path(node: fx.Node) -> str:
    """The path of the module that the node came from, such as `encoder.layer.0.output`."""
    return str(node.meta.get("module_path", ""))


def label(node: fx.Node) -> str:
    """How messages name a node: module path (where there is one) and node name."""
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name


def source_line(node: fx.Node) -> str:
    """The model's source line that the node came from, as `file:line  code`; empty if unknown."""
    return str(node.meta.get("source", ""))


def fake(node: Any) -> Any:
    """The fake value of a node; any other value as it is."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def draws_random(node: fx.Node) -> bool:
    """Whether `node` calls an operator that draws random numbers, and isn't told not to.

    An operator's own flag counts, whatever the mode of the program: a dropout that a model keeps on
    in evaluation draws, one that it froze doesn't, nor does attention without dropout.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    trains = [given[flag] for flag in ("train", "training") if flag in given]
    rates = [given[rate] for rate in ("p", "dropout_p", "dropout") if rate in given]
    return not (False in trains or (rates and not any(rates)))


def is_pure(node: fx.Node, mode: Mode = "eval") -> bool:
    """Whether dropping an unused `node` changes nothing: no write, and in training no draw."""
    if node.op in ("placeholder", "output"):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target._schema.is_mutable:
        return False
    return mode == "eval" or not draws_random(node)


def drop_dead_nodes(graph: fx.Graph, mode: Mode = "eval") -> list[str]:
    """Erase pure nodes that nobody uses, last first; return the names of the operations erased."""
    erased = []
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node, mode):
            if node.op == "call_function":
                erased.append(node.name)
            graph.erase_node(node)
    return erased


def constants_below(nodes: Iterable[fx.Node]) -> set[str]:
    """The names of the state that `nodes` read, directly or as an expression of constants."""
    found: set[str] = set()
    for node in nodes:
        for operand in (node, *node.all_input_nodes):
            found |= _names_of_constant(operand) or set()
    return found


def _names_of_constant(node: fx.Node) -> set[str] | None:
    """The names that an expression of constants reads; None for what depends on inputs."""
    if node.op == "get_attr":
        return {str(node.target)}
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    names: set[str] = set()
    for operand in node.all_input_nodes:
        below = _names_of_constant(operand)
        if below is None:
            return None
        names |= below
    return names


def same_sizes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes (or strides) are provably equal, symbolic sizes compared as expressions.

    Asking `==` of symbolic sizes would record a guard; comparing expressions doesn't.
    """
    return len(one) == len(other) and all(map(_same_size, one, other))


def _same_size(one: Any, other: Any) -> bool:
    one, other = (s.node.expr if isinstance(s, torch.SymInt) else s for s in (one, other))
    return bool(one == other)


def size_at_capture(size: Any) -> int:
    """A size as it was in the example, also where it is dynamic. Records no guard.

    One that depends on data is as `observe_sizes` saw it, or `UNKNOWN_SIZE` where nothing has.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    node = size.node
    if node.has_hint() and node.hint is not None:
        return int(node.hint)
    env = node.shape_env
    observed = {
        symbol: sympy.Integer(env.var_to_hint_override.get(symbol, UNKNOWN_SIZE))
        for symbol in free_unbacked_symbols(size)
    }
    hint = getattr(env, "guarding_hint_or_throw", None) or env.size_hint  # torch renamed it
    return int(hint(node.expr.xreplace(observed)))
