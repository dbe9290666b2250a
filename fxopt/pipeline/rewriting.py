"""The stage of one pass: planned, carried out, checked and judged, or undone where it is guilty."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fxopt.analyses.precision import rounds_activations
from fxopt.claim import Claim, Sqnr
from fxopt.errors import EquivalenceError
from fxopt.pass_list import Scheduled
from fxopt.pipeline.evaluation import joined_rows
from fxopt.pipeline.pass_result import Outputs, PassResult, carry_out, outputs_of
from fxopt.pipeline.recording import StepTaken, violation_text
from fxopt.pipeline.run import Judging, Run
from fxopt.program import Changes, Refusal
from fxopt.rewriting import Pass, Plan
from fxopt.verify import Blame, Verdict, compose


def rewritten(run: Run, scheduled: Scheduled, judging: Judging) -> Run:
    """The run after a pass. One that nobody asked for leaves no trace where it changes nothing.

    Raises `EquivalenceError` for a broken claim, unless that is to be undone.
    """
    pass_ = scheduled.pass_
    judging.progress(f"running {pass_!r}")
    start = time.perf_counter()
    plan = pass_.plan(run.program)
    result = _carry_out(run, pass_, plan, judging)
    reverted: tuple[Refusal, ...] = ()
    if result.verdict is not None and not result.verdict.holds:
        blames = result.blames()
        if judging.on_violation == "raise":
            advice = pass_.advice()
            raise EquivalenceError(violation_text(repr(pass_), result.verdict, blames, advice))
        result, reverted = _reverted(run, pass_, plan, result.verdict, blames, judging)
    fired = result.after.changes.fired
    if not scheduled.asked and not fired:
        return run
    step = StepTaken(
        pass_.name,
        repr(pass_),
        run.program,
        result.after,
        pass_.claim,
        result.verdict,
        start,
        reverted,
        plan.warnings,
        (*plan.details, *result.details),
    )
    joined = {**run.joined, **joined_rows(run.program, result.after)} if fired else run.joined
    after = replace(
        run,
        program=result.after,
        outputs=result.outputs,
        reference=run.reference.after(result, pass_.claim, repr(pass_)),
        unrounded=_unrounded(run, pass_.claim, result),
        joined=joined,
        applied=(*run.applied, *([(pass_, plan)] if fired else ())),
    )
    return after.recording(step, judging)


def _carry_out(run: Run, pass_: Pass, plan: Plan, judging: Judging) -> PassResult:
    return carry_out(pass_, plan, run.program, run.trials, run.outputs, judging.verify)


def _unrounded(run: Run, claim: Claim, result: PassResult) -> tuple[Claim, Outputs] | None:
    """What a compiled program is held to: the outputs before the first pass that rounds, and the
    claims of all that do."""
    after = result.after
    if not rounds_activations(run.program):
        return (claim, run.outputs) if rounds_activations(after) else run.unrounded
    if run.unrounded is None or not after.changes.fired:
        return run.unrounded
    so_far, reference = run.unrounded
    if result.oracle is not None:
        reference = outputs_of(result.oracle, run.trials)
    if isinstance(claim, Sqnr):
        so_far = compose([so_far, claim])
    return so_far, reference


def _reverted(
    run: Run,
    pass_: Pass,
    plan: Plan,
    verdict: Verdict,
    blames: Sequence[Blame],
    judging: Judging,
) -> tuple[PassResult, tuple[Refusal, ...]]:
    """Leave out the worst 1, 2, 4, ... nodes until the claim holds; at last all of them."""
    labels = {site.node: site.label for site in plan.sites}
    guilty = [one.before for one in blames if one.before in labels]
    guilty += [node for node in labels if node not in guilty]
    count = 1
    while True:
        spared = guilty[:count]
        result = _carry_out(run, pass_, plan.without(spared), judging)
        if result.holds or count >= len(guilty):
            break
        count *= 2
    if not result.holds:
        result = PassResult(replace(run.program, changes=Changes()), run.outputs)
    reason = f"reverted: {verdict.measured.text} broke {pass_.claim}"
    return result, tuple(Refusal(reason, labels[node]) for node in spared)
