"""Linears that share one input, whose channels are scaled together, and what absorbs the scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from fxopt.analyses.channel_scaling import Absorption, find_absorption, view_source
from fxopt.nodes import label
from fxopt.operators.linears import Linear, as_linear, refuse_shared_weight
from fxopt.passes.quantization.smoothing_rule import readers
from fxopt.program import Program


@dataclass
class Group:
    """Linears that share one input (or views of it), and where its scale can go, or why not."""

    linears: list[Linear]
    home: Absorption | str

    @property
    def inputs(self) -> list[fx.Node]:
        """What the linears read: one node, or several views."""
        return list(dict.fromkeys(linear.x for linear in self.linears))

    @property
    def name(self) -> str:
        """How messages name it."""
        more = len(self.linears) - 1
        return label(self.linears[0].node) + (f" and {more} more" if more else "")

    @property
    def place(self) -> str:
        """What becomes of the scale, in words."""
        if isinstance(self.home, Absorption):
            return f"absorbed by {label(self.home.producer)}"
        return f"a multiply stays, since {self.home}"


def scaled_groups(
    program: Program, refuse: Callable[[Linear], str | None]
) -> tuple[list[Group], dict[str, str]]:
    """The groups of those linears that `refuse` has nothing against, in the order of the graph, and
    by node name why the others are in none."""
    reasons: dict[str, str] = {}
    by_source: dict[fx.Node, list[Linear]] = {}
    for linear in filter(None, map(as_linear, program.graph.nodes)):
        reason = refuse(linear)
        if reason is None:
            by_source.setdefault(view_source(linear.x)[0], []).append(linear)
        else:
            reasons[linear.node.name] = reason
    groups: list[Group] = []
    taken: set[fx.Node] = set()
    for source, linears in by_source.items():
        kept = _unshared(linears, reasons)
        if kept:
            home = find_absorption(source, readers(kept))
            if isinstance(home, Absorption) and home.producer in taken:
                home = f"{label(home.producer)} takes the scale of another part already"
            if isinstance(home, Absorption):
                taken.add(home.producer)
            groups.append(Group(kept, home))
    return groups, reasons


def _unshared(linears: Sequence[Linear], reasons: dict[str, str]) -> list[Linear]:
    """Those whose weight nothing outside of the group reads."""
    nodes = {linear.node for linear in linears}
    kept = []
    for linear in linears:
        reason = refuse_shared_weight(
            linear, lambda user: user in nodes or (bool(user.users) and nodes >= {*user.users})
        )
        if reason is None:
            kept.append(linear)
        else:
            reasons[linear.node.name] = reason
    return kept
