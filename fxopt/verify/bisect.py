"""Which rewritten node introduced the error.

Both programs run on one trial. At every node that stands for a node of the predecessor the new
value is compared with the old one, and then *replaced* by it, so that each rewritten region is
measured on exactly the inputs it had before: one run finds each node's own error, however deep the
graph and however errors would have piled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxopt.claim import sqnr
from fxopt.evaluate import evaluate
from fxopt.program import Program, label, source_line
from fxopt.verify.oracle import Trial


@dataclass(frozen=True)
class Blame:
    """One node's own error: its name before and after the pass, and its SQNR in dB."""

    before: str
    after: str
    db: float
    text: str


def blame(before: Program, after: Program, trial: Trial) -> list[Blame]:
    """Every node that differs on its predecessor's inputs, the worst first."""
    names = {node.name: node.name for node in before.graph.nodes if node.op == "call_function"}
    names.update(after.changes.replaced)
    stands_for: dict[str, str] = {}
    for old, new in names.items():
        stands_for.setdefault(new, old)
    old_values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor) and node.name in names:
            old_values[node.name] = value
        return value

    evaluate(before, trial.inputs, keep)
    blames: list[Blame] = []

    def compare(node: fx.Node, value: Any) -> Any:
        old = old_values.get(stands_for.get(node.name, ""))
        if old is None or not isinstance(value, Tensor):
            return value
        if value.shape != old.shape or value.dtype != old.dtype:
            blames.append(Blame(stands_for[node.name], node.name, float("-inf"), _describe(node)))
            return old
        db = sqnr(old, value)
        if db != float("inf"):
            blames.append(Blame(stands_for[node.name], node.name, db, _describe(node)))
        return old

    try:
        evaluate(after, trial.inputs, compare)
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        blames.append(Blame("", "", float("-inf"), f"a node that fails: {first}"))
    return sorted(blames, key=lambda one: one.db)


def _describe(node: fx.Node) -> str:
    inputs = ", ".join(operand.name for operand in node.all_input_nodes)
    users = ", ".join(user.name for user in node.users)
    lines = [f"{label(node)} = {node.target}({inputs})", f"used by {users}"]
    if source_line(node):
        lines.append(f"from {source_line(node)}")
    return "\n    ".join(lines)
