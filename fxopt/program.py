"""Program: the frozen value that walks through the house.

A program is a graph in the one dialect, the tensors its `get_attr` nodes name, and the calling
convention of the model it came from. Passes take one and return another; nothing edits one in
place. Tensors that no pass touches are the model's own, shared and never copied.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.calibration import Calibration
from fxopt.choices import Choices
from fxopt.errors import FxoptError, PassError
from fxopt.recipe import Recipe, materialize
from fxopt.signature import Signature

Mode = Literal["eval", "train"]


def check_mode(mode: object) -> None:
    """Raise `PassError` for what is no `Mode`."""
    if mode not in ("eval", "train"):
        raise PassError(f"mode={mode!r}: must be 'eval' or 'train'")


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is: the reason and the node (its module path and name)."""

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class Origin:
    """That a pass, by its textual name, made a tensor of the state, and as what.

    So passes recognise what one of them made, whatever the tensor is called.
    """

    pass_name: str
    role: str


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
    the user gave for learning ranges, while passes run; `choices` are those of passes for another
    program of the model, or will be for its next one, while passes run; `pruned` counts the
    channels that groups had before their least important ones were cut; `taken` names the state
    from which passes have derived other state, so that writing to it by now would be seen in part;
    `config` is the model's, with the sizes that cutting channels has left.
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
    choices: Choices | None = None
    pruned: Mapping[str, int] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()
    config: Any = None

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

    @property
    def origins(self) -> Mapping[str, tuple[Origin, ...]]:
        """Which passes made a tensor of the state what it is, the first one first, by its name.

        Names of tensors that no pass looks for later are left out.
        """
        constants = (node for node in self.graph.nodes if node.op == "get_attr")
        return {str(n.target): n.meta["origins"] for n in constants if n.meta.get("origins")}

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
        return replace(self, state=state, example=(), calibration=None, choices=None)

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
            choices=None,
        )

    def parameter_bytes(self) -> int:
        """Bytes of all state tensors, tied ones counted once."""
        return sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in self.state.values())

    def node_count(self) -> int:
        """Number of operations: nodes that compute, without inputs, constants and output."""
        return sum(node.op == "call_function" for node in self.graph.nodes)
