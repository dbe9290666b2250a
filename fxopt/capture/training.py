"""A training graph in the one dialect: gradients and writes kept as the model has them.

    batch_norm(x, ..., mean, var, True)  =  y of native_batch_norm(...), which gives mean and var
    instance_norm(x, ..., mean, var)     =  instance_norm(x), and mean and var moved by momentum
    no_grad: f(x)                        =  detach(f(x))
    x.op_(y)                             =  op(x, y), and x and what shares its memory renamed

Nothing is decomposed. Where a write can't be followed, torch's functionalization takes over.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from fxopt.capture.dialect import Translation, to_program
from fxopt.capture.memory import Memories, UnfollowedError
from fxopt.capture.writes import functional_arguments, functional_form
from fxopt.errors import CaptureError
from fxopt.program import Program, arguments, fake

aten = torch.ops.aten


def training_program(
    exported: ExportedProgram,
    model: nn.Module,
    forward: inspect.Signature,
    named: Mapping[str, Any],
) -> Program:
    """`to_program` for a model that was exported to train."""
    try:
        return _TrainingTranslation(exported, model, "train").program(forward, named)
    except UnfollowedError:
        # Regions without gradients are lost on this way; the judge of the capture sees it.
        return to_program(exported, model, forward, named, "train")


class _TrainingTranslation(Translation):
    """The walk of `Translation`, in which each write makes a new value."""

    at: fx.Node
    """The node of the exported graph that is being translated."""
    stopped = 0
    """How many regions without gradients it stands in."""

    def _begin(self, placeholders: Sequence[fx.Node]) -> None:
        self.memories = Memories(self._emit, self._value)
        values = (node.meta.get("val") for node in self.exported.graph.nodes)
        self.fake_mode = next(one.fake_mode for one in values if isinstance(one, FakeTensor))
        first: dict[fx.Node, fx.Node] = {}
        for node in placeholders:
            value = self.nodes[node]
            if not isinstance(value, fx.Node):
                continue
            if value in first:
                self.memories.rename_to(node, first[value])
            else:
                first[value] = node
                self.memories.define(node, value)
        self.roots = {value: self.memories.views[node].memory for value, node in first.items()}

    def _value(self, node: Any) -> Any:
        if isinstance(node, fx.Node) and node in self.memories.views:
            return self.memories.read(node)
        return super()._value(node)

    def _copy(self, node: fx.Node) -> None:
        self.at = node
        super()._copy(node)
        self.memories.define(node, self.nodes[node])

    def _copy_functional(self, node: fx.Node) -> None:
        self.at = node
        if node.target is aten.batch_norm.default:
            self._batch_norm(node)
        elif node.target is aten.instance_norm.default:
            self._instance_norm(node)
        else:
            self._overwrite(node)

    def _overwrite(self, node: fx.Node) -> None:
        """`x.op_(...)` and `op(..., out=x)` as `op`, whose value is that of x from now on."""
        target = functional_form(node)
        written = node.kwargs.get("out", node.args[0] if node.args else None)
        if target is None or not isinstance(written, fx.Node):
            raise UnfollowedError(f"{node.name} ({node.target}) writes in a way that isn't known")
        if written not in self.memories.views:
            raise UnfollowedError(f"{node.name} writes to what is no tensor of the graph")
        args, kwargs = fx.map_arg(functional_arguments(node, target), self._value)
        place = written.meta["val"]
        if target is aten.copy.default and _alike(fake(args[1]), place):
            value = args[1]
        else:
            value = self._emit(target, args, kwargs)
        if value.meta["val"].dtype != place.dtype:
            value = self._emit(aten.to.dtype, (value, place.dtype))
        if not _alike(value.meta["val"], place):
            raise UnfollowedError(
                f"{node.name} ({node.target}) changes the shape of what it writes"
            )
        if self.stopped and _carries_gradient(written):
            value = self._emit(aten.detach.default, (value,))
        self.memories.write(written, value)
        self.memories.rename_to(node, written)

    def _batch_norm(self, node: fx.Node) -> None:
        args = {name: self._value(value) for name, value in arguments(node).items()}
        operands = [args[name] for name in ("input", "weight", "bias", *_STATISTICS)]
        made = self._emit(
            aten._native_batch_norm_legit_functional.default,
            (*operands, True, args["momentum"], args["eps"]),
        )
        out, mean, variance = (self._emit(operator.getitem, (made, item)) for item in (0, 3, 4))
        self.memories.define(node, out)
        self._learn(node, mean, variance)

    def _instance_norm(self, node: fx.Node) -> None:
        """The statistics of each image, averaged over the batch, as torch's own kernel has them."""
        args = {name: self._value(value) for name, value in arguments(node).items()}
        plain = {**args, "running_mean": None, "running_var": None}
        self.memories.define(node, self._emit(node.target, tuple(plain.values())))
        x = self._emit(aten.detach.default, (args["input"],))
        axes = list(range(2, x.meta["val"].ndim))
        found = (
            self._emit(aten.mean.dim, (x, axes)),
            self._emit(aten.var.correction, (x, axes), {"correction": 1}),
        )
        moved = []
        for name, of_each in zip(_STATISTICS, found, strict=True):
            kept = args[name]
            new = self._emit(aten.mean.dim, (of_each, [0]))
            if not _alike(new.meta["val"], kept.meta["val"]):
                new = self._emit(aten.to.dtype, (new, kept.meta["val"].dtype))
            moved.append(self._emit(aten.lerp.Scalar, (kept, new, args["momentum"])))
        self._learn(node, *moved)

    def _learn(self, norm: fx.Node, *statistics: fx.Node) -> None:
        given = arguments(norm)
        for name, value in zip(_STATISTICS, statistics, strict=True):
            self.memories.write(given[name], value)

    def _inline_region(self, node: fx.Node) -> None:
        """Replace a no_grad or autocast region by its body; of no_grad no gradient comes back."""
        self.at = node
        module, operands = self._region(node)
        name = node.target.name()  # type: ignore[union-attr]
        stops = name == "wrap_with_set_grad_enabled" and not node.args[0]
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        for placeholder, operand in zip(inner, operands, strict=True):
            if operand in self.memories.views:
                self.memories.rename_to(placeholder, operand)
            else:
                self.nodes[placeholder] = self._value(operand)
        body = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
        self.stopped += stops
        self._inline(body, module)
        self.stopped -= stops
        (results,) = next(iter(reversed(module.graph.nodes))).args
        values = []
        for result in results:
            # What a region hands through is the caller's own tensor, with its gradient.
            if stops and result not in inner and _carries_gradient(result):
                self.memories.detach(result, result)
            values.append(self._value(result))
        self.nodes[node] = values
        for user in node.users:
            index: Any = user.args[1]
            self.nodes[user] = values[index]
            if results[index] in self.memories.views:
                self.memories.rename_to(user, results[index])

    def _writes_followed(self) -> None:
        for place, memory in self.roots.items():
            if not memory.version:
                continue
            if place.op == "get_attr" and isinstance(self.state[str(place.target)], nn.Parameter):
                raise CaptureError(
                    f"{type(self.model).__name__} writes to its parameter {place.target} in "
                    f"forward (at {memory.contents.meta['source'] or 'an unknown line'}), which "
                    "no graph can hold. Write it between the calls, or make it a buffer."
                )
            self._store(place, memory.contents)

    def _emit(self, target: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        """A call in the place of the present node, with its fake value computed."""
        target = aten.reshape.default if target is aten.view.default else target
        new = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        faked, named = fx.map_arg((new.args, new.kwargs), fake)
        with self.fake_mode, torch.no_grad():
            value = target(*faked, **named)
        new.meta = {**self._meta(self.at), "val": value}
        return new


_STATISTICS = ("running_mean", "running_var")


def _alike(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor)
        and one.dtype == other.dtype
        and one.ndim == other.ndim
        and all(str(a) == str(b) for a, b in zip(one.shape, other.shape, strict=True))
    )


def _carries_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
