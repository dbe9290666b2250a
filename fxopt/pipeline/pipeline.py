"""The pipeline: the program so far, its record, and the outputs that the next step must keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from fxopt import wellformed
from fxopt.analyses import rounds_activations, rounds_to_integers
from fxopt.calibration import Calibration
from fxopt.capture import capture, normalize_inputs
from fxopt.claim import Claim, Close, Sqnr
from fxopt.data_sizes import observe_sizes
from fxopt.errors import EquivalenceError, FxoptError, InputError, OutsideError
from fxopt.evaluation_mode import evaluation_mode, without_dropout
from fxopt.lower import Lower, compile_program
from fxopt.optimized import (
    Evaluation,
    Optimized,
    OptimizedStep,
    Origins,
    Outcome,
    graph_module,
)
from fxopt.passes import Autocast, Int8Linear, Prepack, SelectKernels
from fxopt.passes.channel_plan import ChannelPlan
from fxopt.pipeline.attempt import Attempt, Outputs, attempt, outputs_of
from fxopt.pipeline.domains import domain_of
from fxopt.pipeline.evaluation import Evaluator, Rows, joined_rows
from fxopt.pipeline.recording import Taken, since, violation_text
from fxopt.pipeline.resized_config import resized_config
from fxopt.pipeline.result import Result, runner
from fxopt.pipeline.standard import Standard
from fxopt.program import Changes, Mode, Program, Refusal
from fxopt.rewriting import Pass, Plan, Stage
from fxopt.verify import (
    Blame,
    RunAll,
    Trial,
    Verdict,
    compose,
    is_random,
    judge,
    judge_learning,
    note_on_attributes,
    one_by_one,
    output_names,
    run_model,
    run_program,
    trials,
    with_edges,
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
        self.taken: list[tuple[Pass, Plan]] = []
        self.joined: dict[str, Rows] = {}
        self.inputs: Inputs | None = None
        self.notes: list[str] = []
        self.config: Any = getattr(model, "config", None)
        self.lowering: Lower | None = None
        self.kernels_selected = False
        self.compiled: Callable[..., Any] | None = None
        self.module: fx.GraphModule | None = None
        self.calibration: Calibration | None = None
        self.elsewhere: list[tuple[Inputs, OutsideError]] = []
        self.trials: tuple[Trial, ...] = ()
        self.last_trials: tuple[Trial, ...] = ()
        self.outputs: Outputs = []
        self.unrounded: tuple[Claim, Outputs] | None = None

    def capture(
        self,
        inputs: Inputs | None,
        mode: Mode,
        more: Sequence[Inputs],
        calibration: Iterable[Any] | None,
        further: bool = False,
    ) -> None:
        """Capture the model (or continue from its program) and judge the capture itself.

        A `further` program of a model is judged on those of the inputs `more` that are its own, and
        calibrated on the example where none of the batches is.
        """
        self.progress(f"capturing {type(self.model).__name__}")
        start = time.perf_counter()
        self.inputs = inputs
        if isinstance(self.model, Optimized) and self.model.is_captured:
            program = replace(self.model.program, changes=Changes(), taken=frozenset())
            observe_sizes(program)
        else:
            program = capture(self.model, inputs, mode, empty=further)
        wellformed.check(program)
        self.capture_ms = since(start)
        if self.verify:
            program = with_edges(program, run_model(self.model, program))
        if calibration is not None:
            instead = program.example if further else None
            self.calibration = Calibration(calibration, program.signature, self.progress, instead)
            program = replace(program, calibration=self.calibration)
        self.program = program
        self.standard = Standard(program)
        self.notes += program.notes
        claim, verdict = self._judge_capture(self._own(more, further))
        self._record(
            Taken(
                "capture", "capture", program, program, claim, verdict, start,
                fired={"operations": program.node_count()},
            )
        )  # fmt: skip

    def _own(self, more: Sequence[Inputs], further: bool) -> list[list[Tensor]]:
        """The tensors of those inputs that are this program's; `elsewhere` keeps the others."""
        own = []
        for one in more:
            try:
                own.append(self._flat(one))
            except OutsideError as outside:
                self.elsewhere.append((one, outside))
            except InputError:
                if not further:
                    raise
        return own

    def _judge_capture(self, own: Sequence[list[Tensor]]) -> tuple[Claim, Verdict | None]:
        claim: Claim = Close()
        if not self.verify:
            return claim, None
        program = self.program
        extra = [[tensor.clone() for tensor in one] for one in own]
        changed: set[str] = set()
        found, skipped = trials(program, run_model(self.model, program, changed), extra)
        if changed:
            self.notes.append(note_on_attributes(self.model, program, changed))
        # One other size a step keeps judging cheap; the whole list is judged on both.
        self.trials = found[:-1] if len(found) == len(extra) + 3 else found
        self.last_trials = found[len(self.trials) :]
        self.notes += skipped
        self.outputs = [trial.outputs for trial in self.trials]
        if rounds_activations(program):  # a quantized module, transformed once more
            claim = (Int8Linear() if rounds_to_integers(program) else Autocast()).claim
            self.unrounded = (claim, self.outputs)
            # What comes now decides ties otherwise, and so differs as far as rounding goes.
            self.standard = self.standard.plus(claim)
        # All of them now: a size at which the graph fails must not show at the end of the list.
        reference = [trial.outputs for trial in found]
        names = output_names(program)
        verdict, outputs = judge(claim, found, reference, run_program(program), names)
        self.outputs = outputs[: len(self.trials)]
        if program.mode == "train" and verdict.holds and self.unrounded is None:
            learnt = judge_learning(claim, self.model, program, self.trials[0])
            verdict = learnt if learnt is not None and not learnt.holds else verdict
        if not verdict.holds:
            raise EquivalenceError(violation_text("the capture", verdict))
        return claim, verdict

    def run(self, pass_: Pass) -> None:
        """Plan, apply, check and judge one pass."""
        if pass_.stage >= Stage.KERNELS and not self.kernels_selected:
            # First of the kernel level: what it fuses must not be taken apart by another pass.
            self.kernels_selected = True
            if not self._lists(SelectKernels):
                self._rewrite(SelectKernels(), quiet=True)
        if isinstance(pass_, Lower):
            if pass_.prepack and self.program.mode == "eval" and not self._lists(Prepack):
                self._rewrite(Prepack(), quiet=True)
            self._lower(pass_)
        else:
            self._rewrite(pass_)

    def _lists(self, kind: type[Pass]) -> bool:
        return any(isinstance(pass_, kind) for pass_ in self.passes)

    def _rewrite(self, pass_: Pass, quiet: bool = False) -> None:
        self.progress(f"running {pass_!r}")
        start = time.perf_counter()
        before = self.program
        plan = pass_.plan(before)
        tried = self._attempt(pass_, plan)
        reverted: tuple[Refusal, ...] = ()
        if tried.verdict is not None and not tried.verdict.holds:
            blames = tried.blames()
            if self.on_violation == "raise":
                text = violation_text(repr(pass_), tried.verdict, blames, pass_.advice())
                raise EquivalenceError(text)
            tried, reverted = self._revert(pass_, plan, tried.verdict, blames)
        if quiet and not tried.after.changes.fired:
            return
        self.standard = self.standard.after(tried, pass_.claim, repr(pass_))
        self._note_rounding(pass_.claim, before, tried)
        if isinstance(plan, ChannelPlan) and tried.after.changes.fired:
            self.config = resized_config(self.config, before, tried.after)
        if tried.after.changes.fired:
            self.joined = {**self.joined, **joined_rows(before, tried.after)}
            self.taken.append((pass_, plan))
        self.program, self.outputs = tried.after, tried.outputs
        self._record(
            Taken(
                pass_.name, repr(pass_), before, tried.after, pass_.claim, tried.verdict, start,
                reverted, plan.warnings, (*plan.details, *tried.details),
            )
        )  # fmt: skip

    def _note_rounding(self, claim: Claim, before: Program, tried: Attempt) -> None:
        """Keep what a compiled program is held to: the outputs before the first pass that rounds,
        and the claims of all that do."""
        after = tried.after
        if not rounds_activations(before):
            if rounds_activations(after):
                self.unrounded = (claim, self.outputs)
        elif self.unrounded and after.changes.fired:
            so_far, reference = self.unrounded
            if tried.oracle is not None:
                reference = outputs_of(tried.oracle, self.trials)
            if isinstance(claim, Sqnr):
                so_far = compose([so_far, claim])
            self.unrounded = (so_far, reference)

    def _attempt(self, pass_: Pass, plan: Plan) -> Attempt:
        return attempt(pass_, plan, self.program, self.trials, self.outputs, self.verify)

    def _judge(
        self, claim: Claim, reference: Sequence[Sequence[Tensor]], run: RunAll
    ) -> tuple[Verdict, list[tuple[Tensor, ...]]]:
        names = output_names(self.program)
        return judge(claim, self.trials, reference, run, names, self.program.state)

    def _revert(
        self, pass_: Pass, plan: Plan, verdict: Verdict, blames: Sequence[Blame]
    ) -> tuple[Attempt, tuple[Refusal, ...]]:
        """Leave out the worst 1, 2, 4, ... nodes until the claim holds; at last all of them."""
        labels = {site.node: site.label for site in plan.sites}
        guilty = [one.before for one in blames if one.before in labels]
        guilty += [node for node in labels if node not in guilty]
        count = 1
        while True:
            spared = guilty[:count]
            tried = self._attempt(pass_, plan.without(spared))
            if tried.holds or count >= len(guilty):
                break
            count *= 2
        if not tried.holds:
            tried = Attempt(replace(self.program, changes=Changes()), self.outputs)
        reason = f"reverted: {verdict.measured.text} broke {pass_.claim}"
        return tried, tuple(Refusal(reason, labels[node]) for node in spared)

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
        self.standard = self.standard.plus(options.claim)
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
        before = self.standard.program if self.unrounded else self.program
        given = Result(self.program, self.module, compiled)
        return claim, given.judged_without_dropout(claim, before, options, self.trials)

    def finish(self, measure_cost: bool | None) -> Outcome:
        """Judge the whole list against the original, measure, and write the report."""
        program = self.program if self.lowering else self.program.materialized()
        module = self.module or graph_module(program)
        self._note_unread_calibration()
        origins = self._origins()
        if origins is not None:
            self.notes.append(
                f"weights were derived from {len(origins)} tensors of the original: once one of "
                "these is changed in place, calls raise ModelError; transform again then"
            )
        evaluation = self._evaluation(program)
        program = replace(program, changes=Changes(), notes=tuple(self.notes), calibration=None)
        result = Result(program, module, self.compiled)
        end_to_end = self._judge_whole(result) if self.verify else None
        steps = tuple(step.record for step in self.steps)
        report = result.reported(self.standard.captured, self.capture_ms, steps, end_to_end)
        trials = (*self.trials, *self.last_trials)
        report = replace(report, domains=(domain_of(program, trials),))
        if measure_cost or (measure_cost is None and self.lowering is not None):
            self.progress("measuring latency and memory")
            report = result.with_cost(report, self.model)
        return Outcome(
            program,
            report,
            tuple(self.steps),
            self.lowering,
            self.compiled,
            module,
            None if self.config is getattr(self.model, "config", None) else self.config,
            evaluation=evaluation,
            origins=origins,
        )

    def _evaluation(self, program: Program) -> Evaluation:
        """What the model computes in evaluation, where `program` trains; or why that isn't had."""
        if program.mode == "eval":
            return Evaluation()
        self.progress("capturing the evaluation graph")
        captured = replace(self.standard.captured, calibration=None)
        kept = (name for name, one in captured.state.items() if program.state.get(name) is one)
        evaluator = Evaluator(self.model, captured, tuple(self.taken), frozenset(kept), self.joined)
        held = self.standard if self.budget is None else self.standard.original()
        budget = None if held.oracle is not None or not self.verify else self.budget or held.budget
        try:
            found, missing = evaluator.program(self.inputs, program, budget), ""
        except FxoptError as error:
            found, missing = None, str(error)
            self.notes.append(f"opt.eval() is refused: {missing}")
        return Evaluation(found, missing, evaluator.for_call)

    def _origins(self) -> Origins | None:
        """The original's tensors from which passes derived others, but for what calls write, which
        is copied anyway, and in training for what the result itself trains."""
        captured, program = self.standard.captured, self.program
        kept = {id(tensor) for tensor in program.state.values()} if program.mode == "train" else ()
        taken = {
            name: tensor
            for name, tensor in captured.state.items()
            if name in program.taken - captured.written
            and isinstance(tensor, Tensor)
            and id(tensor) not in kept
        }
        earlier = self.model.origins if isinstance(self.model, Optimized) else None
        return Origins(taken, earlier) if taken or earlier else None

    def _judge_whole(self, result: Result) -> str:
        """The end-to-end verdict, against the original where the user set a budget."""
        held = self.standard if self.budget is None else self.standard.original()
        known = self.outputs
        if held.redrawn:
            program, known = evaluation_mode(without_dropout(result.program)), []
            result = replace(result, program=program, compiled=None)
        elif is_random(result.program):
            # Compiled code draws other numbers; what it computes has been judged without dropout.
            result = replace(result, compiled=None)
        return result.judged(self.budget, held, (*self.trials, *self.last_trials), known)

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
