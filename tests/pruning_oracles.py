"""What is true of channels, found out by force: nothing here asks how an analysis came to its word.

A cut is *sound* if the channels feed nothing but their readers: with every reader made to see zeros
in their place, no change of the parameters that make them reaches any other value of the program.

A cut is *complete* if what stays is needed. By hand, a channel is cut where it is read:

    a weight's reader        sees zero, and adds what one number in the channel's place would give
                             away from any border
    a product, mean or sum   sees zero
    a norm                   takes its statistics over the other channels

and if the outputs stay what they were, the channel was kept for nothing. A group that can't be cut
at all, whatever its weights are, must be the caller's (an input has it), or have a path out beside
its readers: with these made to see zeros, a change of the parameters still reaches an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Channels, Group, Place, Reader
from fxopt.interpreter import evaluate
from fxopt.nodes import label
from fxopt.program import Program
from fxopt.recipe import materialize

aten = torch.ops.aten

_NEEDLESS = 1e-9
"""Relative change of an output in float64 that counts as none."""

_SHAKEN = 64
"""Programs with other parameters. A relu that sees one position, as in squeeze and excitation, is
off in half of them, whatever the inputs are: in all of 64 one channel of 10^19 is."""


@dataclass(frozen=True)
class Stray:
    """A value that changes though the channels that were changed don't stand there."""

    node: fx.Node
    change: float

    def __str__(self) -> str:
        return f"{label(self.node)} = {self.node.format_node()} changes by {self.change:.1e}"


def strays(
    program: Program, channels: Channels, group: Group, chosen: Tensor, inputs: Sequence[Tensor]
) -> Iterator[Stray]:
    """Where a change of `chosen` channels (bool [size]) gets to beside its own places.

    Every parameter of theirs is replaced by noise while every reader sees zeros instead of them.
    """
    blind = blinded(group, chosen)
    before = _values(program, inputs, blind)
    after = _values(disturbed(program, group, chosen), inputs, blind)
    keep = {channels.walk.dims.find(group.dim): ~chosen}
    for node, old in before.items():
        for axis, dim in enumerate(channels.walk.of(node)):
            kept = channels.walk.dims.kept(dim, keep)
            if kept is not None:
                index = kept.nonzero().flatten()
                old, after[node] = (
                    old.index_select(axis, index),
                    after[node].index_select(axis, index),
                )
        change = relative_change([old], [after[node]])
        if change > _NEEDLESS:
            yield Stray(node, change)


def reaches_output(
    program: Program, group: Group, chosen: Tensor, inputs: Sequence[Tensor], *, blind: bool
) -> bool:
    """Whether other parameters for the chosen channels change an output.

    With `blind`, the readers that are known see zeros instead of these channels.
    """
    override = blinded(group, chosen) if blind else {}
    reference = evaluate(program, inputs, override=override)
    return any(
        relative_change(
            reference,
            evaluate(disturbed(program, group, chosen, seed), inputs, override=override),
        )
        > _NEEDLESS
        for seed in range(8)
    )


def is_needed(program: Program, group: Group, channel: int) -> bool:
    """Whether cutting one channel by hand changes an output, or a statistic.

    A softmax drops what is added to a whole row of a product, a norm drops the scale that a norm
    before it has set: products, means and norms are looked at for themselves. A relu may be off on
    every input of a test by chance; so the channel is needed as well if it is in a program with
    other parameters that are zero where these are, of which `_SHAKEN` are tried.
    """
    chosen = torch.arange(group.size) == channel
    override = {node: _cut_by_hand(reads, chosen) for node, reads in _by_node(group).items()}
    for one in (program, *(shaken(program, seed) for seed in range(_SHAKEN))):
        if _is_in_statistics(one, group, chosen):
            return True
        reference = evaluate(one, one.example)
        cut = evaluate(one, one.example, override=override)
        if relative_change(reference, cut) > _NEEDLESS:
            return True
    return False


def _is_in_statistics(program: Program, group: Group, chosen: Tensor) -> bool:
    """Whether any norm, mean or sum reads the channel, or a product in which no side is zero."""
    others = [one for one in group.readers if one.kind != "weight"]
    values = _values(program, program.example, {}) if others else {}

    def is_zero(place: Place | None) -> bool:
        if place is None or place.node not in values:
            return False
        index = place.positions[chosen].flatten()
        return not bool(values[place.node].index_select(place.axis, index).any())

    return any(
        one.kind == "norm" or not (is_zero(one.operand) or is_zero(one.weight)) for one in others
    )


def refusal_is_justified(program: Program, channels: Channels, group: Group, channel: int) -> bool:
    """Whether a group that can't be cut has a reason to: see the head of this file."""
    leaf = channels.walk.dims.find(group.dim)
    for node in program.placeholders:
        for axis in channels.walk.of(node):
            if leaf in channels.walk.dims.leaves(axis):
                return True
    chosen = torch.arange(group.size) == channel
    return reaches_output(program, group, chosen, program.example, blind=True)


def shaken(program: Program, seed: int) -> Program:
    """`program` with other parameters and floating inputs; what is zero stays zero."""
    generator = torch.Generator().manual_seed(seed)

    def shake(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        noise = noise.to(tensor.dtype)
        return tensor * (noise.abs() + 0.1 if name.endswith("running_var") else noise)

    state = {name: shake(name, materialize(tensor)) for name, tensor in program.state.items()}
    example = tuple(shake("", tensor) for tensor in program.example)
    return replace(program, state=state, example=example)


def pruned_by_hand(chosen: Sequence[tuple[Group, Tensor]]) -> dict[fx.Node, Callable[..., Any]]:
    """Overrides by which every reader does without the chosen channels of several groups.

    Weights and sums see zeros; means and norms are taken over the other channels.
    """
    reads: dict[fx.Node, list[tuple[Reader, Tensor]]] = {}
    for group, gone in chosen:
        for reader in group.readers:
            reads.setdefault(reader.node, []).append((reader, gone))
    return {node: _without(node, found) for node, found in reads.items()}


def _without(node: fx.Node, reads: Sequence[tuple[Reader, Tensor]]) -> Callable[..., Any]:
    zeros = [_zeros(reader.operand, gone) for reader, gone in reads]
    kinds = {reader.kind for reader, _ in reads}
    if "norm" in kinds:
        return _norm_of_the_rest(node, torch.cat([one.index for one in zeros]))
    share = 1.0
    if "mean" in kinds:
        for axis in {one.axis for one in zeros}:
            gone = {int(i) for one in zeros if one.axis == axis for i in one.index}
            size = int(zeros[0].node.meta["val"].shape[axis])
            share *= size / (size - len(gone))
    compute = _computed(node, zeros)
    return lambda *args, **kwargs: compute(*args, **kwargs) * share


def blinded(group: Group, chosen: Tensor) -> dict[fx.Node, Callable[..., Any]]:
    """Overrides by which each reader sees zeros in place of the chosen channels.

    A norm takes its statistics so; the channels themselves pass through it.
    """
    found: dict[fx.Node, Callable[..., Any]] = {}
    for node, reads in _by_node(group).items():
        zeros = [_zeros(one.operand, chosen) for one in reads]
        blind = _computed(node, zeros)
        is_norm = reads[0].kind == "norm"
        found[node] = _passing(node, zeros[0].index, blind) if is_norm else blind
    return found


def _passing(node: fx.Node, index: Tensor, blind: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        seen = node.target(*args, **kwargs).index_select(-1, index)  # type: ignore[operator]
        return blind(*args, **kwargs).index_copy(-1, index, seen)

    return compute


def disturbed(program: Program, group: Group, chosen: Tensor, seed: int = 0) -> Program:
    """`program` with noise for every floating parameter entry of the chosen channels."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(program.state)
    for place in group.places:
        tensor = materialize(state[place.name])
        if not tensor.is_floating_point():
            continue
        index = place.positions[chosen].flatten()
        old = tensor.detach().index_select(place.axis, index)
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        if place.name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        state[place.name] = tensor.detach().clone().index_copy_(place.axis, index, noise)
    return replace(program, state=state)


def relative_change(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The largest of max|out - ref| / max|ref| over pairs; infinite where one isn't finite."""
    worst = 0.0
    for old, new in zip(reference, outputs, strict=True):
        if not old.numel() or not old.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(old, new) else float("inf"))
            continue
        both = torch.stack([old.detach().double(), new.detach().double()]).clamp(-1e30, 1e30)
        if bool(both.isnan().any()):
            return float("inf")
        scale = float(both[0].abs().max()) or 1.0
        worst = max(worst, float((both[1] - both[0]).abs().max()) / scale)
    return worst


def _values(
    program: Program, inputs: Sequence[Tensor], override: Mapping[fx.Node, Callable[..., Any]]
) -> dict[fx.Node, Tensor]:
    """Every tensor that is computed."""
    found: dict[fx.Node, Tensor] = {}

    def observe(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor) and node.op == "call_function":
            found[node] = value.clone()
        return value

    evaluate(program, inputs, observe, override)
    return found


def _by_node(group: Group) -> dict[fx.Node, list[Reader]]:
    found: dict[fx.Node, list[Reader]] = {}
    for reader in group.readers:
        found.setdefault(reader.node, []).append(reader)
    return found


@dataclass(frozen=True)
class _Zeros:
    """Zeros at `index` along `axis` of what `node` gives."""

    node: fx.Node
    axis: int
    index: Tensor


def _zeros(place: Place, chosen: Tensor) -> _Zeros:
    return _Zeros(place.node, place.axis, place.positions[chosen].flatten())


def _computed(
    node: fx.Node,
    zeros: Sequence[_Zeros],
    instead: Callable[[Tensor, int], Tensor] = lambda values, axis: torch.zeros_like(values),
) -> Callable[..., Any]:
    """The node's target on operands in which the entries named by `zeros` are replaced."""

    def replaced(operand: Any, value: Any) -> Any:
        for one in zeros:
            if operand is one.node:
                new = instead(value.index_select(one.axis, one.index), one.axis)
                value = value.index_copy(one.axis, one.index, new)
        return value

    def compute(*args: Any, **kwargs: Any) -> Any:
        found = [replaced(*pair) for pair in zip(node.args, args, strict=True)]
        named = {name: replaced(node.kwargs[name], value) for name, value in kwargs.items()}
        return node.target(*found, **named)  # type: ignore[operator]

    return compute


def _cut_by_hand(reads: Sequence[Reader], chosen: Tensor) -> Callable[..., Any]:
    node, kinds = reads[0].node, {reader.kind for reader in reads}
    if "norm" in kinds:
        return _norm_of_the_rest(node, reads[0].operand.positions[chosen].flatten())
    without = _computed(node, [_zeros(one.operand, chosen) for one in reads])
    if kinds != {"weight"}:
        return without
    constant = _computed(node, [_zeros(one.operand, chosen) for one in reads], _centre)
    axis = 1 if "conv" in str(node.target) else -1

    def compute(*args: Any, **kwargs: Any) -> Any:
        result = without(*args, **kwargs)
        lost = constant(*args, **kwargs) - result
        for place, size in enumerate(lost.shape):
            if place != axis % lost.ndim:
                lost = lost.narrow(place, size // 2, 1)
        return result + lost

    return compute


def _centre(values: Tensor, axis: int) -> Tensor:
    """One number for each index along `axis`: the one in the middle of everything else."""
    for place, size in enumerate(values.shape):
        if place != axis:
            values = values.narrow(place, size // 2, 1).expand_as(values)
    return values


def _norm_of_the_rest(node: fx.Node, cut: Tensor) -> Callable[..., Any]:
    def compute(x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        kept = torch.ones(x.shape[-1], dtype=torch.bool)
        kept[cut] = False
        rest = [one[kept] if isinstance(one, Tensor) else one for one in args]
        named = {k: v[kept] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        normed = node.target(x[..., kept], [int(kept.sum())], *rest, **named)  # type: ignore[operator]
        result = torch.zeros_like(x)
        result[..., kept] = normed
        return result

    return compute
