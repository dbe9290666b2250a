"""A step as it was taken, written down for the report; and a broken claim, in words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxopt.claim import Claim
from fxopt.graph_text import GraphText, text
from fxopt.optimized import OptimizedStep
from fxopt.program import Program, Refusal
from fxopt.report import Step
from fxopt.verify import Blame, Verdict


@dataclass(frozen=True)
class StepTaken:
    """One step that was taken: `before` and `after` it, and how it was judged.

    `start` is when it began, by `time.perf_counter`; `fired` left out is what the driver counted;
    `verdict` None means that there was nothing to judge, or that judging is off.
    """

    name: str
    spec: str
    before: Program
    after: Program
    claim: Claim
    verdict: Verdict | None
    start: float
    reverted: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    fired: Mapping[str, int] | None = None

    def recorded(self, verify: bool) -> OptimizedStep:
        """The step's record and graph; `verify` says whether steps are judged at all."""
        verdict, before, after = self.verdict, self.before, self.after
        old_names = {node.name for node in before.graph.nodes}
        changed = tuple(node.name for node in after.graph.nodes if node.name not in old_names)
        if verdict is not None:
            measured = verdict.measured.text
        else:
            measured = "unchanged" if verify else "not judged"
        step = Step(
            name=self.name,
            spec=self.spec,
            fired=self.fired if self.fired is not None else after.changes.fired,
            refused=after.changes.refused,
            reverted=self.reverted,
            nodes_before=before.node_count(),
            nodes_after=after.node_count(),
            bytes_before=before.parameter_bytes(),
            bytes_after=after.parameter_bytes(),
            claim=str(self.claim),
            measured=measured,
            holds=verdict is None or verdict.holds,
            milliseconds=since(self.start),
            warnings=self.warnings,
            details=self.details,
            graph=text(after),
            changed=changed,
        )
        return OptimizedStep(step, GraphText(after.outline()))


def violation_text(
    who: str, verdict: Verdict, blames: Sequence[Blame] = (), advice: str | None = None
) -> str:
    """What an `EquivalenceError` says: who broke which claim where, the guilty node, the advice."""
    lines = [
        f"{who} broke its claim",
        f"  claimed: {verdict.claim}",
        f"  measured: {verdict.measured.text}, in {verdict.where} on {verdict.trial.what}",
    ]
    if blames:
        worst = blames[0]
        outputs = "" if worst.outputs_db is None else f"{worst.outputs_db:.1f} dB at the outputs, "
        lines.append(f"  guilty node ({outputs}{worst.db:.1f} dB on its own): {worst.text}")
    if advice is not None:
        lines.append(f"  {advice}")
    return "\n".join(lines)


def since(start: float) -> float:
    """Milliseconds since `start`, a `time.perf_counter` reading."""
    return (time.perf_counter() - start) * 1e3
