"""Many refusals as few lines: those that give the same reason, figures aside, become one group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.program import Refusal

_FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Group:
    """Refusals of one reason: its text (that of the first), the nodes, and whether figures vary."""

    reason: str
    nodes: tuple[str, ...]
    varies: bool

    def __str__(self) -> str:
        if len(self.nodes) == 1:
            return f"1 x {self.reason} ({self.nodes[0]})"
        vary = "; figures vary" if self.varies else ""
        return f"{len(self.nodes)} x {self.reason} (e.g. {self.nodes[0]}{vary})"


def group(refusals: Sequence[Refusal]) -> list[Group]:
    """The groups, largest first, equal ones in order of appearance."""
    alike: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        alike.setdefault(_FIGURE.sub("#", refusal.reason), []).append(refusal)
    groups = [
        Group(
            found[0].reason,
            tuple(refusal.node for refusal in found),
            len({refusal.reason for refusal in found}) > 1,
        )
        for found in alike.values()
    ]
    return sorted(groups, key=lambda found: -len(found.nodes))
