"""Channels that nothing needs: unread, or the same constant whatever the inputs are.

A reader can do without channel j of its input x if

    W[:, j] = 0                        it is unread, or
    x_j = c_j for all inputs           a weight's reader takes W[:, j] c_j into its bias, or
    x_j = 0                            a mean, a sum, an rms_norm, or a product of activations

A channel is dead if every one of its readers can do without it. Rows of a weight that are dead
themselves don't count as reading, so that a chain of layers dies from its end backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Channels, Dim, Group, Place, Reader
from fxopt.analyses.constant_channels import Known, constant_channels
from fxopt.analyses.constant_channels.products import is_padded
from fxopt.nodes import arguments, label, module_path
from fxopt.operators.linears import LINEAR_TARGETS
from fxopt.operators.views import REGROUPINGS
from fxopt.program import Program, Refusal

aten = torch.ops.aten

_FORGETFUL = {
    aten.scaled_dot_product_attention.default: (
        "value",
        "attention gives 0 in their place to a query whose keys are all masked",
    ),
    aten.group_norm.default: ("input", "a group norm isn't followed"),
    **dict.fromkeys(
        REGROUPINGS,
        ("self", "they aren't followed where other axes join theirs"),
    ),
}
"""By operator, the operand of which a constant may get lost in it, and why."""


@dataclass(frozen=True)
class Dead:
    """The dead channels of one group, bool [size], and why others that look dead are not.

    `absorbed` maps readers' names to the channels along their input's axis, bool [K], whose
    constants must move into the reader's bias before the cut.
    """

    channels: Tensor
    refusals: tuple[Refusal, ...] = ()
    absorbed: Mapping[str, Tensor] = field(default_factory=dict)


def dead_channels(program: Program, channels: Channels) -> dict[str, Dead]:
    """The dead channels of each group that has any, or that has refusals to report, by name."""
    search = _Search(program, channels, constant_channels(program))
    return search.run()


class _Search:
    def __init__(
        self, program: Program, channels: Channels, facts: Mapping[fx.Node, Known]
    ) -> None:
        self.program = program
        self.channels = channels
        self.facts = facts
        self.keep: dict[Dim, Tensor] = {}
        self.leaf: Dim | None = None  # of the group that is looked at
        self.unread: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self.forgetful = self._forgetful()

    def run(self) -> dict[str, Dead]:
        found: dict[str, Dead] = {}
        settled = False
        while not settled:
            settled = True
            for group in reversed(self.channels.groups):
                dead = self._dead(group)
                old = found.get(group.name)
                if old is not None and torch.equal(old.channels, dead.channels):
                    continue
                found[group.name] = dead
                if bool(dead.channels.any()):
                    settled = False
                    self.keep[self.channels.walk.dims.find(group.dim)] = ~dead.channels
        return {
            group.name: found[group.name]
            for group in self.channels.groups
            if bool(found[group.name].channels.any()) or found[group.name].refusals
        }

    def _dead(self, group: Group) -> Dead:
        none = torch.zeros(group.size, dtype=torch.bool)
        if not group.readers:
            return Dead(none)
        self.leaf = self.channels.walk.dims.find(group.dim)
        needless = [self._needless(reader) for reader in group.readers]
        dead = torch.stack(needless).all(0)
        refusals = []
        if group.refusals and bool(dead.any()):
            why = f"{_count(dead)} are dead, but can't be cut: {group.refusals[0]}"
            return Dead(none, (Refusal(why, group.name),))
        if not bool(dead.any()):
            refusals = self._refusals(group, needless)
        if bool(dead.all()):
            dead = dead.clone()
            dead[0] = False  # a tensor without any channel is no tensor
        return Dead(dead, tuple(refusals), self._absorbed(group, dead))

    def _refusals(self, group: Group, needless: list[Tensor]) -> list[Refusal]:
        """Why channels that are constant for one reader stay for another."""
        constant = torch.stack([self._constant(reader.operand) for reader in group.readers])
        wanted = constant.any(0)
        if not bool(wanted.any()):
            return self._forgotten(group)
        reasons: dict[str, Tensor] = {}
        for reader, spared in zip(group.readers, needless, strict=True):
            stuck = wanted & ~spared
            if bool(stuck.any()):
                reasons.setdefault(f"{_why(reader)} ({label(reader.node)})", stuck)
        return [
            Refusal(f"{_count(stuck)} are constant, but {why}", group.name)
            for why, stuck in reasons.items()
        ]

    def _forgetful(self) -> dict[Dim, list[tuple[fx.Node, fx.Node, str]]]:
        """(operand, node, why) of each node of `_FORGETFUL`, by the leaves of its operand."""
        found: dict[Dim, list[tuple[fx.Node, fx.Node, str]]] = {}
        for node in self.program.graph.nodes:
            if node.target in _FORGETFUL:
                name, why = _FORGETFUL[node.target]
                operand = arguments(node)[name]
                axes = self.channels.walk.of(operand)
                for leaf in {leaf for dim in axes for leaf in self.channels.walk.dims.leaves(dim)}:
                    found.setdefault(leaf, []).append((operand, node, why))
        return found

    def _forgotten(self, group: Group) -> list[Refusal]:
        """Where channels that are constant so far may be something else from then on."""
        found = []
        assert self.leaf is not None
        for operand, node, why in self.forgetful.get(self.leaf, []):
            stuck = self._known_in(operand) & ~self._known_in(node)
            if bool(stuck.any()):
                reason = f"{_count(stuck)} are constant, but {why} ({label(node)})"
                found.append(Refusal(reason, group.name))
        return found

    def _known_in(self, node: fx.Node) -> Tensor:
        """Which channels of the group that is looked at hold constants alone in a node's value."""
        dims, known = self.channels.walk.dims, self.facts.get(node)
        assert self.leaf is not None
        for axis, dim in enumerate(self.channels.walk.of(node)):
            size = node.meta["val"].shape[axis]
            if known is not None and self.leaf in dims.leaves(dim) and isinstance(size, int):
                constant = known.mask.movedim(axis, 0).flatten(1).all(1).expand(size)
                return constant[dims.positions(dim, self.leaf)].all(1)
        return torch.zeros(1, dtype=torch.bool)

    def _needless(self, reader: Reader) -> Tensor:
        """Which channels, bool [size], a reader can do without."""
        if reader.kind == "weight":
            assert reader.weight is not None
            return self._unread(reader.weight) | self._absorbable(reader)
        if reader.kind == "norm" and reader.node.target is not aten.rms_norm.default:
            return torch.zeros(len(reader.operand.positions), dtype=torch.bool)
        zero = self._constant(reader.operand, only_zero=True)
        if reader.kind == "product":
            assert reader.weight is not None
            zero |= self._constant(reader.weight, only_zero=True)
        return zero

    def _absorbable(self, reader: Reader) -> Tensor:
        known = self._constant(reader.operand)
        return known & self._constant(reader.operand, only_zero=True) | (
            known if refuse_constant(reader.node) is None else torch.zeros_like(known)
        )

    def _absorbed(self, group: Group, dead: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for reader in group.readers:
            if reader.kind != "weight" or reader.weight is None:
                continue
            moved = dead & ~self._unread(reader.weight)
            moved &= ~self._constant(reader.operand, only_zero=True)
            if bool(moved.any()):
                size = int(reader.operand.node.meta["val"].shape[reader.operand.axis])
                mask = torch.zeros(size, dtype=torch.bool)
                mask[reader.operand.positions[moved].flatten()] = True
                found[reader.node.name] = found.get(reader.node.name, mask) | mask
        return found

    def _constant(self, place: Place, only_zero: bool = False) -> Tensor:
        """Which channels are one constant (or zero) at a place, whatever the inputs are."""
        known = self.facts.get(place.node)
        size = place.node.meta["val"].shape[place.axis]
        if known is None or not bool(known.mask.any()):
            return torch.zeros(len(place.positions), dtype=torch.bool)
        mask = known.mask.movedim(place.axis, 0).flatten(1)
        values = known.values.movedim(place.axis, 0).flatten(1)
        same = values == (0.0 if only_zero else values[:, :1])
        constant = (mask & same).all(1).expand(int(size)) | self._gone(place)
        return constant[place.positions].all(1)

    def _unread(self, place: Place) -> Tensor:
        """Which channels meet zeros only, in what stays of a weight."""
        others = [
            None if axis == place.axis else self.channels.walk.dims.kept(dim, self.keep)
            for axis, dim in enumerate(self.channels.walk.of(place.node))
        ]
        staying = sum(int(mask.sum()) for mask in others if mask is not None)
        cached = self.unread.get((place.name, place.axis))
        if cached is None or cached[1] != staying:
            weight = self.program.tensor(place.name).detach()
            for axis, mask in enumerate(others):
                if mask is not None:
                    weight = weight.index_select(axis, mask.nonzero().flatten().to(weight.device))
            zero = ~(weight != 0).movedim(place.axis, 0).flatten(1).any(1).cpu()
            cached = self.unread[place.name, place.axis] = zero, staying
        return (cached[0] | self._gone(place))[place.positions].all(1)

    def _gone(self, place: Place) -> Tensor:
        """Which indices of a place's axis leave with channels of other groups, bool [K] or [1]."""
        dims, axis = self.channels.walk.dims, self.channels.walk.of(place.node)[place.axis]
        leaves = set(dims.leaves(axis)) - {self.leaf}
        others = {leaf: self.keep[leaf] for leaf in leaves if leaf in self.keep}
        kept = dims.kept(axis, others)
        return torch.zeros(1, dtype=torch.bool) if kept is None else ~kept


def refuse_constant(node: fx.Node) -> str | None:
    """Why a layer can't take a constant other than zero of its input into its bias."""
    if node.target in LINEAR_TARGETS:
        return None
    if "transposed" in str(node.target) or "conv_transpose" in str(node.target):
        return "a transposed convolution spreads it unevenly at the border"
    named = arguments(node)
    if "padding" not in named:
        return "it has no bias to take it up"
    kernel = torch.Size(named["weight"].meta["val"].shape[2:])
    return "a convolution pads with zeros beside it" if is_padded(named, kernel) else None


def _why(reader: Reader) -> str:
    """Why a reader needs a channel that is constant."""
    if reader.kind == "norm":
        return "a norm takes its statistics over it"
    if reader.kind in ("mean", "sum"):
        return f"a {reader.kind} counts it, and it isn't zero"
    if reader.kind == "product":
        return "it is multiplied with another activation, and isn't zero"
    reason = refuse_constant(reader.node)
    return reason or f"it varies where {module_path(reader.node) or reader.node.name} reads it"


def _count(dead: Tensor) -> str:
    return f"{int(dead.sum())} of {len(dead)} channels"
