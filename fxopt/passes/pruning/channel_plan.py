"""ChannelPlan: which channels leave which groups, in the form that both pruning passes share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from fxopt.analyses.channels import Group
from fxopt.passes.pruning.resized_config import resized_config
from fxopt.program import Changes, Program
from fxopt.rewriting import Plan, Site


@dataclass(frozen=True)
class ChannelPlan(Plan):
    """A plan to cut channels: `keep` gives what stays, int64 indices, by the group's name.

    `stands_for` names the node that a group is excluded with.
    """

    names_state: ClassVar[bool] = True

    keep: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    stands_for: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def kept(self) -> dict[str, Tensor]:
        """What stays of the groups that are not excluded."""
        return {
            name: kept
            for name, kept in self.keep.items()
            if self.stands_for[name] not in self.excluded
        }

    def carried_out(self, before: Program, after: Program) -> Program:
        """`after`, which this plan made of `before`: its config as its sizes are now, and this
        plan's refusals among its changes, for the report."""
        config = before.config
        if after.changes.fired:
            config = resized_config(config, before, after)
        changes = after.changes.then(Changes(refused=self.refusals))
        return replace(after, config=config, changes=changes)


def sites_of(groups: Iterable[Group]) -> tuple[Site, ...]:
    """A site for each group: the first of its readers."""
    return tuple(Site("CutChannels", node_of(group), group.name) for group in groups)


def node_of(group: Group) -> str:
    """The node that messages and reverts name a group by: its first reader."""
    return group.readers[0].node.name if group.readers else group.places[0].node.name


def cut_details(groups: Iterable[Group], keep: Mapping[str, Tensor]) -> tuple[str, ...]:
    """One line for each run of groups that lose the same: `12 x ffn: 3072 -> 1536`."""
    counts: dict[str, list[str]] = {}
    for group in groups:
        line = f"{group.kind}: {group.size} -> {len(keep[group.name])}"
        counts.setdefault(line, []).append(group.name)
    return tuple(
        f"{len(names)} x {line}" if len(names) > 1 else f"{names[0]}: {line}"
        for line, names in counts.items()
    )
