"""How a call of the model becomes the graph's inputs, and its results the model's own output type.

A call is bound to the model's `forward` signature, so keyword order doesn't matter; arguments that
are `None` or equal to their default are dropped, so that leaving them out and spelling them out are
one thing. What remains is a dict {argument name: value} whose tensor leaves are the graph's
placeholders, in that order; its other leaves (a flag, a number) were constants of the capture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxopt.calls import bind, path_text, unbind
from fxopt.errors import InputError, OutsideError
from fxopt.guards import Guard, Shapes, SizeCheck


@dataclass(frozen=True)
class TensorInput:
    """What one placeholder takes: its path among the arguments, dtype, device type and sizes.

    A size is an int where the capture specialised it, else the name of a dynamic size; two equal
    names must have equal sizes in a call.
    """

    path: str
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | str, ...]

    @property
    def type_text(self) -> str:
        """Dtype, sizes and device in words."""
        return f"{self.dtype}[{', '.join(map(str, self.sizes))}] on {self.device}"

    def __str__(self) -> str:
        return f"{self.path}: {self.type_text}"


@dataclass(frozen=True)
class Range:
    """Bounds of a dynamic size as the capture found them; `high` None when there is none."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Signature:
    """The calling convention of a captured model: calls into leaves, leaves into outputs.

    `zeros` names arguments that, left out of a call, are zeros of the shape of another one;
    `guards` are what the sizes of a call must satisfy beside `ranges` and fixed sizes; `added`
    names the constants that no call gives, since the capture put them in itself.
    """

    forward: inspect.Signature
    in_spec: pytree.TreeSpec
    leaves: tuple[TensorInput | object, ...]
    ranges: Mapping[str, Range]
    out_spec: pytree.TreeSpec
    out_constants: Mapping[int, object]
    zeros: Mapping[str, str] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    added: frozenset[str] = frozenset()

    @property
    def tensors(self) -> tuple[TensorInput, ...]:
        """The graph's placeholders, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorInput))

    @property
    def names(self) -> tuple[str, ...]:
        """The argument names that the program was captured with, in order."""
        return tuple(self.in_spec.context)

    @cached_property
    def constants(self) -> dict[str, object]:
        """Arguments that hold no tensor and are fixed in the graph, as {name: value}."""
        values = pytree.tree_unflatten(list(self.leaves), self.in_spec)
        return {
            name: value
            for name, value in values.items()
            if not any(isinstance(leaf, TensorInput) for leaf in pytree.tree_leaves(value))
        }

    @property
    def paths(self) -> list[str]:
        """What messages call each placeholder."""
        return [tensor.path for tensor in self.tensors]

    @cached_property
    def _check(self) -> SizeCheck:
        highest = {name: r.high for name, r in self.ranges.items() if r.high is not None}
        return SizeCheck([tensor.sizes for tensor in self.tensors], highest, self.guards)

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the sizes of these tensors, in placeholder order, are within the guards."""
        return self.fit([tensor.shape for tensor in tensors])

    def fit(self, shapes: Shapes) -> bool:
        """Whether tensors of these shapes, in placeholder order, are within the guards."""
        return self._check.fits(shapes)

    def on_device(self, device: torch.device) -> Signature:
        """This convention for tensors on `device`."""
        leaves = tuple(
            replace(leaf, device=device) if isinstance(leaf, TensorInput) else leaf
            for leaf in self.leaves
        )
        return replace(self, leaves=leaves)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in placeholder order.

        Raises `InputError` when the call doesn't fit what was captured: another structure, another
        constant, or a tensor of another dtype, device, rank or fixed size; `OutsideError`, which is
        one, where sizes or constants ask for another program of the same model.
        """
        leaves = None if args else self._plain_leaves(kwargs)
        if leaves is None:
            leaves = self._leaves(args, kwargs)
        tensors: list[Tensor] = []
        shapes: list[torch.Size] = []
        for leaf, expected in zip(leaves, self.leaves, strict=True):
            if isinstance(expected, TensorInput):
                self._check_tensor(leaf, expected)
                tensors.append(leaf)
                shapes.append(leaf.shape)
            elif isinstance(leaf, Tensor) or leaf != expected:
                raise OutsideError(
                    f"{self._path_of(expected)} is {leaf!r} in this call, but the graph was "
                    f"captured with {expected!r}. Transform the model again with example_inputs "
                    "that hold the new value."
                )
        if not self._check.fits(shapes):
            self._refuse(shapes)
        return tensors

    def _refuse(self, shapes: Shapes) -> NoReturn:
        """Raise the `OutsideError` that names the first relation which these shapes break."""
        paths = self.paths
        for guard in self.guards:
            if guard.origin != "operator" and not guard.is_kept(shapes):
                raise OutsideError(self._broken_text(guard, paths), branch=True)
        sizes: dict[str, tuple[int, str]] = {}
        for shape, expected in zip(shapes, self.tensors, strict=True):
            for axis, (size, wanted) in enumerate(zip(shape, expected.sizes, strict=True)):
                self._check_size(expected, axis, size, wanted, sizes)
        broken = next(guard for guard in self.guards if not guard.is_kept(shapes))
        raise OutsideError(self._broken_text(broken, paths))

    def _broken_text(self, guard: Guard, paths: Sequence[str]) -> str:
        return (
            f"{guard.broken_text(paths)}; the graph was captured where {guard.text(paths)}. "
            "Transform the model again with example_inputs of these sizes."
        )

    @cached_property
    def _counts(self) -> tuple[int | None, ...] | None:
        """For each argument how many tensors its tuple has, None for one that is a tensor itself;
        None where arguments are nested otherwise, or hold constants."""
        if len(self.leaves) != len(self.tensors):
            return None
        counts = [_count(spec) for spec in self.in_spec.children()]
        return None if -1 in counts else tuple(counts)

    def _plain_leaves(self, kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of a call that names each argument, all of them tensors or tuples of as many
        as at capture; None for any other call."""
        if self._counts is None or len(kwargs) != len(self.names):
            return None
        leaves: list[Any] = []
        for name, count in zip(self.names, self._counts, strict=True):
            value = kwargs.get(name)
            if count is None:
                leaves.append(value)
            elif type(value) is tuple and len(value) == count:
                leaves += value
            else:
                return None
        return leaves if all(isinstance(leaf, Tensor) for leaf in leaves) else None

    def _leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call's arguments, nested as they were at capture."""
        given = bind(self.forward, args, kwargs, spelled_out=self.names)
        for name, value in self.constants.items():
            if name not in given:
                given[name] = self._left_out(name, value)
        for name, like in self.zeros.items():
            if name not in given and isinstance(given.get(like), Tensor):
                given[name] = torch.zeros_like(given[like])
        if set(given) != set(self.names):
            raise InputError(self._structure_text(given))
        leaves, spec = pytree.tree_flatten({name: given[name] for name in self.names})
        if spec != self.in_spec:
            raise InputError(
                f"the arguments are nested otherwise than at capture: got {spec}, captured "
                f"{self.in_spec}. Transform the model again with example_inputs of that structure."
            )
        return leaves

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of the model's own call on `tensors`, given in placeholder order."""
        remaining = iter(tensors)
        leaves = [
            next(remaining) if isinstance(leaf, TensorInput) else leaf for leaf in self.leaves
        ]
        return unbind(self.forward, pytree.tree_unflatten(leaves, self.in_spec))

    def _left_out(self, name: str, value: object) -> object:
        """The constant for an argument that a call leaves out; eager takes forward's default."""
        if name in self.added:
            return value
        parameter = self.forward.parameters.get(name)
        default = f"={parameter.default!r}" if parameter is not None else " left out"
        raise OutsideError(
            f"this call leaves out {name}, so that the model runs with {name}{default}, but the "
            f"graph was captured with {value!r}. Give {name}={value!r} in the call, or transform "
            "the model again with example_inputs that leave it out."
        )

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The model's own output type, made of the graph's output tensors."""
        if self._out_counts is not None:
            return _nested(outputs, self._out_counts)
        remaining = iter(outputs)
        leaves = [
            self.out_constants[index] if index in self.out_constants else next(remaining)
            for index in range(self.out_spec.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, self.out_spec)

    @cached_property
    def _out_counts(self) -> tuple[int | None, ...] | None:
        """As `_counts`, for an output that is a tuple."""
        if self.out_constants or self.out_spec.type is not tuple:
            return None
        counts = [_count(spec) for spec in self.out_spec.children()]
        return None if -1 in counts else tuple(counts)

    def _path_of(self, constant: object) -> str:
        paths, _ = pytree.tree_flatten_with_path(
            pytree.tree_unflatten(list(self.leaves), self.in_spec)
        )
        return next((path_text(path) for path, leaf in paths if leaf is constant), "an argument")

    def _structure_text(self, given: Mapping[str, Any]) -> str:
        missing = [name for name in self.names if name not in given]
        extra = [name for name in given if name not in self.names]
        parts = [f"the graph was captured with the arguments ({', '.join(self.names)})"]
        if missing:
            parts.append(f"this call leaves out {', '.join(missing)}")
        if extra:
            parts.append(f"this call adds {', '.join(extra)}")
        return (
            "; ".join(parts)
            + ". Call it with the same arguments, or transform the model again with "
            "example_inputs that hold these."
        )

    def _check_tensor(self, value: object, expected: TensorInput) -> None:
        if not isinstance(value, Tensor):
            raise InputError(f"{expected.path} must be a tensor ({expected}), not {value!r:.80}")
        if value.dtype != expected.dtype:
            raise InputError(
                f"{expected.path} has dtype {value.dtype}, but the graph was captured with "
                f"{expected.dtype}. Convert it with .to({expected.dtype})."
            )
        if value.device != expected.device:
            raise InputError(
                f"{expected.path} is on {value.device}, but the model is on {expected.device}. "
                f"Move it with .to('{expected.device}')."
            )
        if value.ndim != len(expected.sizes):
            raise InputError(
                f"{expected.path} has rank {value.ndim} and shape {tuple(value.shape)}, but the "
                f"graph takes rank {len(expected.sizes)}: {expected}."
            )

    def _check_size(
        self,
        expected: TensorInput,
        axis: int,
        size: int,
        wanted: int | str,
        sizes: dict[str, tuple[int, str]],
    ) -> None:
        if isinstance(wanted, int):
            if size != wanted:
                raise OutsideError(
                    f"{expected.path} has size {size} on axis {axis}, but the model fixes it to "
                    f"{wanted}: {expected}."
                )
            return
        known, path = sizes.setdefault(wanted, (size, f"{expected.path} axis {axis}"))
        if known != size:
            raise OutsideError(
                f"{expected.path} has size {size} on axis {axis}, but {path} has {known}; "
                "the model needs them equal."
            )
        limit = self.ranges.get(wanted)
        if limit is not None and limit.high is not None and size > limit.high:
            raise OutsideError(
                f"{expected.path} has size {size} on axis {axis}; the model takes at most "
                f"{limit.high} there."
            )


def gathered(named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Values by path, with the items of one container that follow each other and have the same
    value in one entry: `keys[0] to keys[29]`."""
    runs: list[tuple[str, str, str]] = []
    for path, value in named:
        first, _, before = runs[-1] if runs else ("", "", "")
        if "[" in path and value == before and _container(path) == _container(first):
            runs[-1] = (first, path, value)
        else:
            runs.append((path, path, value))
    return [(one if one == last else f"{one} to {last}", value) for one, last, value in runs]


def _container(path: str) -> str:
    return path.rpartition("[")[0]


def _count(spec: pytree.TreeSpec) -> int | None:
    """How many leaves a tuple has, None for a leaf itself, -1 for what is nested otherwise."""
    if spec.is_leaf():
        return None
    plain = spec.type is tuple and all(child.is_leaf() for child in spec.children())
    return spec.num_leaves if plain else -1


def _nested(leaves: Sequence[Any], counts: Sequence[int | None]) -> tuple[Any, ...]:
    nested: list[Any] = []
    start = 0
    for count in counts:
        if count is None:
            nested.append(leaves[start])
        else:
            nested.append(tuple(leaves[start : start + count]))
        start += 1 if count is None else count
    return tuple(nested)
