"""The pipeline: the program so far, its record, and the outputs that the next step must keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from fxopt import wellformed
from fxopt.analyses import rounds_activations
from fxopt.calibration import Calibration
from fxopt.capture import capture, normalize_inputs
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import EquivalenceError, PassError
from fxopt.lower import Lower, compile_program
from fxopt.optimized import Optimized, OptimizedStep, Outcome, graph_module
from fxopt.passes import Int8Linear, SelectKernels
from fxopt.pipeline.recording import Taken, since, violation_text
from fxopt.pipeline.result import Result, runner
from fxopt.program import Changes, Mode, Program, Refusal
from fxopt.rewriting import Pass, Plan, Stage
from fxopt.verify import (
    Blame,
    RunAll,
    Trial,
    Verdict,
    blame,
    compose,
    is_random,
    judge,
    judge_gradients,
    judge_nodes,
    one_by_one,
    output_names,
    run_model,
    run_program,
    trials,
)

OnViolation = Literal["raise", "revert"]
Progress = Callable[[str], None]
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Pipeline:
    """One transformation under way: the program so far, its record, the reference outputs."""

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        verify: bool,
        on_violation: OnViolation,
        budget: Claim | None,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.passes = passes
        self.verify = verify
        self.on_violation = on_violation
        self.budget = budget
        self.progress = progress or (lambda line: None)
        self.steps: list[OptimizedStep] = []
        self.claims: list[Claim] = []
        self.notes: list[str] = []
        self.lowering: Lower | None = None
        self.kernels_selected = False
        self.compiled: Callable[..., Any] | None = None
        self.module: fx.GraphModule | None = None
        self.calibration: Calibration | None = None
        self.trials: tuple[Trial, ...] = ()
        self.last_trials: tuple[Trial, ...] = ()
        self.outputs: list[tuple[Tensor, ...]] = []
        self.unrounded: tuple[Claim, list[tuple[Tensor, ...]]] | None = None

    def capture(
        self,
        inputs: Inputs | None,
        mode: Mode,
        more: Sequence[Inputs],
        calibration: Iterable[Any] | None,
    ) -> None:
        """Capture the model (or continue from its program) and judge the capture itself."""
        self.progress(f"capturing {type(self.model).__name__}")
        start = time.perf_counter()
        if isinstance(self.model, Optimized) and self.model.is_captured:
            program = replace(self.model.program, changes=Changes())
        else:
            program = capture(self.model, inputs, mode)
        wellformed.check(program)
        self.capture_ms = since(start)
        if calibration is not None:
            self.calibration = Calibration(calibration, program.signature, self.progress)
            program = replace(program, calibration=self.calibration)
        self.program = self.captured = program
        self.notes += program.notes
        claim, verdict = self._judge_capture(more)
        self._record(
            Taken(
                "capture", "capture", program, program, claim, verdict, start,
                fired={"operations": program.node_count()},
            )
        )  # fmt: skip

    def _judge_capture(self, more: Sequence[Inputs]) -> tuple[Claim, Verdict | None]:
        claim: Claim = Close()
        if not self.verify:
            return claim, None
        program = self.program
        extra = [self._flat(one) for one in more]
        found, skipped = trials(program, run_model(self.model, program), extra)
        # One other size a step keeps judging cheap; the whole list is judged on both.
        self.trials = found[:-1] if len(found) == len(extra) + 3 else found
        self.last_trials = found[len(self.trials) :]
        self.notes += skipped
        self.outputs = [trial.outputs for trial in self.trials]
        if rounds_activations(program):  # a quantized module, transformed once more
            claim = Int8Linear().claim
            self.unrounded = (claim, self.outputs)
        verdict, self.outputs = self._judge(claim, self.outputs, run_program(program))
        if not verdict.holds:
            raise EquivalenceError(violation_text("the capture", verdict))
        return claim, verdict

    def run(self, pass_: Pass) -> None:
        """Plan, apply, check and judge one pass."""
        if pass_.stage >= Stage.KERNELS and not self.kernels_selected:
            # First of the kernel level: what it fuses must not be taken apart by another pass.
            self.kernels_selected = True
            if not any(isinstance(other, SelectKernels) for other in self.passes):
                self._rewrite(SelectKernels(), quiet=True)
        if isinstance(pass_, Lower):
            self._lower(pass_)
        else:
            self._rewrite(pass_)

    def _rewrite(self, pass_: Pass, quiet: bool = False) -> None:
        self.progress(f"running {pass_!r}")
        start = time.perf_counter()
        before = self.program
        plan = pass_.plan(before)
        after, verdict, outputs = self._attempt(pass_, plan, before)
        reverted: tuple[Refusal, ...] = ()
        if verdict is not None and not verdict.holds:
            blames = blame(before, after, verdict.trial)
            if self.on_violation == "raise":
                raise EquivalenceError(violation_text(repr(pass_), verdict, blames))
            after, verdict, outputs, reverted = self._revert(pass_, plan, before, verdict, blames)
        if quiet and not after.changes.fired:
            return
        self._note_rounding(pass_.claim, before, after)
        self.program, self.outputs = after, outputs
        self.claims.append(pass_.claim)
        self._record(
            Taken(
                pass_.name, repr(pass_), before, after, pass_.claim, verdict, start,
                reverted, plan.warnings, plan.details,
            )
        )  # fmt: skip

    def _note_rounding(self, claim: Claim, before: Program, after: Program) -> None:
        """Keep what a compiled program is held to: the outputs before the first pass that rounds,
        and the claims of all that do."""
        if not rounds_activations(before):
            if rounds_activations(after):
                self.unrounded = (claim, self.outputs)
        elif self.unrounded and isinstance(claim, Sqnr) and after.changes.fired:
            so_far, reference = self.unrounded
            self.unrounded = (compose([so_far, claim]), reference)

    def _attempt(
        self, pass_: Pass, plan: Plan, before: Program
    ) -> tuple[Program, Verdict | None, list[tuple[Tensor, ...]]]:
        after = pass_.apply(replace(before, changes=Changes()), plan)
        if not after.changes.fired and not _same(before, after):
            raise PassError(
                f"{pass_!r} returned another program without going through "
                "fxopt.rewriting.rewrite; only the driver may edit, since it counts and keeps "
                "metadata"
            )
        wellformed.check(after)
        if not self.verify or not after.changes.fired:
            return after, None, self.outputs
        if not isinstance(pass_.claim, Exact) and rounds_activations(before):
            verdict = judge_nodes(pass_.claim, before, after, self.trials)
            if verdict is not None:
                outputs = run_program(after)([trial.inputs for trial in self.trials])
                return after, verdict, [tuple(output) for output in outputs]
        judged, kept = self._judge(pass_.claim, self.outputs, run_program(after))
        if after.mode == "train" and judged.holds:
            learnt = judge_gradients(pass_.claim, before, after, self.trials[0])
            judged = learnt if learnt is not None and not learnt.holds else judged
        return after, judged, kept

    def _judge(
        self, claim: Claim, reference: Sequence[Sequence[Tensor]], run: RunAll
    ) -> tuple[Verdict, list[tuple[Tensor, ...]]]:
        return judge(claim, self.trials, reference, run, output_names(self.program))

    def _revert(
        self, pass_: Pass, plan: Plan, before: Program, verdict: Verdict, blames: Sequence[Blame]
    ) -> tuple[Program, Verdict | None, list[tuple[Tensor, ...]], tuple[Refusal, ...]]:
        """Leave out the worst 1, 2, 4, ... nodes until the claim holds; at last all of them."""
        labels = {site.node: site.label for site in plan.sites}
        guilty = [one.before for one in blames if one.before in labels]
        guilty += [node for node in labels if node not in guilty]
        count = 1
        while True:
            spared = guilty[:count]
            after, now, outputs = self._attempt(pass_, plan.without(spared), before)
            if now is None or now.holds or count >= len(guilty):
                break
            count *= 2
        if now is not None and not now.holds:
            after, now, outputs = before, None, self.outputs
        reason = f"reverted: {verdict.measured.text} broke {pass_.claim}"
        return after, now, outputs, tuple(Refusal(reason, labels[node]) for node in spared)

    def _lower(self, options: Lower) -> None:
        self.progress(f"lowering with {options!r}: compiling, which can take a minute")
        start = time.perf_counter()
        self.program = self.program.materialized()
        self.module = graph_module(self.program)
        lowered = compile_program(self.module, self.program, options, self.progress)
        claim, verdict = options.claim, None
        if self.verify:
            claim, verdict = self._judge_lowered(options, lowered.callable)
            if not verdict.holds:
                raise EquivalenceError(violation_text(repr(options), verdict))
        self.lowering, self.compiled = options, lowered.callable
        self.claims.append(options.claim)
        kernels = lowered.kernels or {"operations": self.program.node_count()}
        self._record(
            Taken(
                options.name, repr(options), self.program, self.program, claim, verdict, start,
                warnings=lowered.warnings, fired=kernels,
            )
        )  # fmt: skip

    def _judge_lowered(self, options: Lower, compiled: Callable[..., Any]) -> tuple[Claim, Verdict]:
        """The verdict on the compiled program, without dropout where it draws random numbers.

        Fused rounding decides ties by other last bits; see judge_nodes. A compiled program can't be
        judged node by node, so it is held to the rounding pass's own claim.
        """
        assert self.module is not None
        claim, reference = self.unrounded or (options.claim, self.outputs)
        if not is_random(self.program):
            run = one_by_one(runner(compiled, self.program, self.module))
            verdict, self.outputs = self._judge(claim, reference, run)
            return claim, verdict
        before = self.captured if self.unrounded else self.program
        given = Result(self.program, self.module, compiled)
        return claim, given.judged_without_dropout(claim, before, options, self.trials)

    def finish(self, measure_cost: bool | None) -> Outcome:
        """Judge the whole list against the original, measure, and write the report."""
        program = self.program if self.lowering else self.program.materialized()
        module = self.module or graph_module(program)
        self._note_unread_calibration()
        program = replace(program, changes=Changes(), notes=tuple(self.notes), calibration=None)
        result = Result(program, module, self.compiled)
        end_to_end = None
        if self.verify:
            budget = self.budget or compose(self.claims)
            known = (self.trials, self.outputs)
            # Compiled code draws other numbers; what it computes has been judged without dropout.
            judged = replace(result, compiled=None) if is_random(program) else result
            end_to_end = judged.judged(budget, known, self.last_trials)
        steps = tuple(step.record for step in self.steps)
        report = result.reported(self.captured, self.capture_ms, steps, end_to_end)
        if measure_cost or (measure_cost is None and self.lowering is not None):
            self.progress("measuring latency and memory")
            report = result.with_cost(report, self.model)
        return Outcome(program, report, tuple(self.steps), self.lowering, self.compiled, module)

    def _note_unread_calibration(self) -> None:
        if self.calibration is not None and not self.calibration.was_read:
            self.notes.append(
                "calibration= was given, but no pass of the list asked for it: none of them "
                "learns from inputs with these options"
            )

    def _record(self, taken: Taken) -> None:
        self.steps.append(taken.recorded(self.verify))

    def _flat(self, inputs: Inputs) -> list[Tensor]:
        signature = self.program.signature
        return signature.flatten((), normalize_inputs(signature.forward, inputs))


def _same(before: Program, after: Program) -> bool:
    return (
        after.graph is before.graph
        and after.state.keys() == before.state.keys()
        and all(after.state[name] is tensor for name, tensor in before.state.items())
    )
