"""Rule: match / refuse / rewrite, one local equation of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx

from fxopt.claim import Claim, Close
from fxopt.errors import RewriteError
from fxopt.nodes import label
from fxopt.program import Program
from fxopt.rewriting.edit import Edit
from fxopt.rewriting.pattern import Match, Op, Pattern, Target, find


class Rule:
    """One local rewrite. Its docstring is the equation: left side = right side.

    A subclass gives `pattern` (or a tuple of patterns, one per output), and `rewrite`, which builds
    the right side and returns the node (or nodes, one per output) that takes the root's place.
    `refuse` looks at a match and returns why it must stay as it is, or None. A rule in a pass list
    is a pass of its own, judged by its `claim`.
    """

    pattern: ClassVar[Pattern | tuple[Pattern, ...]]
    claim: Claim = Close()
    exclusive: ClassVar[bool] = True
    """Refuse a match whose inner values are used elsewhere too: they'd be computed twice."""

    @property
    def name(self) -> str:
        """The rule's name in plans and reports."""
        return type(self).__name__

    def see(self, program: Program) -> None:
        """Look at the program as a whole before its nodes are matched."""

    def targets(self) -> tuple[Target, ...]:
        """The operators that a match's root can be; empty for a rule that looks at every call."""
        first = self._patterns()[0]
        if not isinstance(first, Op):
            raise RewriteError(f"rule {self.name}: the outermost pattern must be op(...)")
        return first.targets

    def match(self, node: fx.Node) -> Match | None:
        """The match rooted at `node`, or None."""
        return find(self._patterns(), node)

    def refuse(self, match: Match) -> str | None:
        """Why this match must stay as it is; None to rewrite it."""
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node | Sequence[fx.Node]:
        """Build the right side through `edit`; return what takes the place of the roots."""
        raise NotImplementedError(f"rule {self.name} has no rewrite")

    def reason_to_refuse(self, match: Match) -> str | None:
        """`refuse`, and before it the engine's own reasons.

        An inner value is used elsewhere, or, with several outputs, an operand is computed only
        after the first of them, where the right side is to stand.
        """
        if self.exclusive:
            known = {*match.inner, *match.roots}
            for node in match.inner:
                other = next((user for user in node.users if user not in known), None)
                if other is not None:
                    return f"the inner value {node.name} is also used by {label(other)}"
        if len(match.roots) > 1:
            first, own = min(match.roots), {*match.inner, *match.roots}
            for value in match.bound.values():
                if isinstance(value, fx.Node) and value not in own and not value < first:
                    return f"the operand {value.name} is computed after the output {first.name}"
        return self.refuse(match)

    def _patterns(self) -> tuple[Any, ...]:
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
