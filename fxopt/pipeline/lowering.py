"""The last stage of a list: the program becomes a callable, judged as that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from fxopt.claim import Claim
from fxopt.errors import EquivalenceError
from fxopt.graph_modules import graph_module
from fxopt.lower import Lowering
from fxopt.pipeline.pass_result import Outputs
from fxopt.pipeline.recording import StepTaken, violation_text
from fxopt.pipeline.result import Result, runner
from fxopt.pipeline.run import Judging, Run
from fxopt.verify import Verdict, is_random, judge, one_by_one, output_names


def lowered(run: Run, lowering: Lowering, judging: Judging) -> Run:
    """The run with its program compiled. Raises `LowerError`, and `EquivalenceError` for code that
    computes something else than the graph."""
    judging.progress(f"lowering with {lowering!r}: compiling, which can take a minute")
    start = time.perf_counter()
    program = run.program.materialized()
    run = replace(run, program=program)
    module = graph_module(program)
    made = lowering.lower(module, program, judging.progress)
    claim: Claim = lowering.claim
    verdict, outputs = None, run.outputs
    if judging.verify:
        claim, verdict, outputs = _judged(run, lowering, module, made.callable)
        if not verdict.holds:
            raise EquivalenceError(violation_text(repr(lowering), verdict))
    step = StepTaken(
        lowering.name,
        repr(lowering),
        program,
        program,
        claim,
        verdict,
        start,
        warnings=made.warnings,
        fired=made.kernels or {"operations": program.node_count()},
    )
    after = replace(
        run,
        outputs=outputs,
        reference=run.reference.plus(lowering.claim),
        lowering=lowering,
        compiled=made.callable,
        module=module,
    )
    return after.recording(step, judging)


def _judged(
    run: Run, lowering: Lowering, module: fx.GraphModule, compiled: Callable[..., Any]
) -> tuple[Claim, Verdict, Outputs]:
    """The verdict on the compiled program, without dropout where it draws random numbers.

    Fused rounding decides ties by other last bits; see judge_nodes. A compiled program can't be
    judged node by node, so it is held to the rounding pass's own claim.
    """
    program = run.program
    claim, reference = run.unrounded or (lowering.claim, run.outputs)
    if not is_random(program):
        call = one_by_one(runner(compiled, program, module))
        names = output_names(program)
        verdict, outputs = judge(claim, run.trials, reference, call, names, program.state)
        return claim, verdict, outputs
    before = run.reference.program if run.unrounded else program
    given = Result(program, module, compiled)
    return claim, given.judged_without_dropout(claim, before, lowering, run.trials), run.outputs
