"""The pipeline: capture, then plan, apply, check and judge each pass, lower, measure, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxopt import measure, wellformed
from fxopt.analyses import rounds_activations
from fxopt.capture import capture, check_is_module, normalize_inputs
from fxopt.claim import Claim, Close
from fxopt.errors import EquivalenceError, NotCapturedError, PassError
from fxopt.graph_text import GraphText, text
from fxopt.lower import Lower, compile_program
from fxopt.optimized import Optimized, OptimizedStep, Outcome, graph_module, make_optimized
from fxopt.passes import Int8Linear, SelectKernels
from fxopt.program import Changes, Mode, Program, Refusal
from fxopt.report import Report, Step, picture
from fxopt.rewriting import Pass, Plan
from fxopt.signature import bind, forward_signature
from fxopt.spec import resolve_passes
from fxopt.verify import (
    Blame,
    RunAll,
    Trial,
    Verdict,
    blame,
    compose,
    judge,
    judge_nodes,
    one_by_one,
    output_names,
    run_model,
    run_program,
    state_kept,
    trials,
)

OnViolation = Literal["raise", "revert"]
Progress = Callable[[str], None]
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def transform(
    model: nn.Module,
    passes: str | Iterable[Any],
    *,
    example_inputs: Inputs | None = None,
    mode: Mode = "eval",
    verify: bool = True,
    verify_inputs: Sequence[Inputs] = (),
    on_violation: OnViolation = "raise",
    budget: Claim | None = None,
    measure_cost: bool | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """A cheaper module in place of `model`, every step of its making shown to be equivalent.

    `passes` are pass or rule instances or textual specs, run in order. `example_inputs` (a tensor,
    a tuple of positionals or a dict of keywords) may be left out where a transformers config tells
    what they are; else the capture waits for the first call. Each pass is judged on the example, on
    another size and on `verify_inputs`, against its predecessor; the whole list once more, on one
    size more, against the eager original, within `budget` (left out: the sum of the claims). A
    broken claim raises `EquivalenceError`, or with `on_violation="revert"` undoes the change at the
    guilty nodes.

    `measure_cost` times original and result and reads their peak memory; left out, it does so when
    the list ends in `Lower`. `progress` is called with a line before each long step.

    `model` is never modified; tensors that no pass touches are shared with it.

    Raises `ModelError`, `InputError`, `CaptureError`, `PassError`, `EquivalenceError`,
    `LowerError`: see `fxopt.errors`.
    """
    check_is_module(model)
    resolved = resolve_passes(passes)
    if on_violation not in ("raise", "revert"):
        raise PassError(f"on_violation={on_violation!r}: must be 'raise' or 'revert'")
    if mode not in ("eval", "train"):
        raise PassError(f"mode={mode!r}: must be 'eval' or 'train'")

    def build(inputs: Inputs | None) -> Outcome:
        pipeline = _Pipeline(model, resolved, verify, on_violation, budget, progress)
        pipeline.capture(inputs, mode, verify_inputs)
        for pass_ in resolved:
            pipeline.run(pass_)
        return pipeline.finish(measure_cost)

    def build_at_first_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        if not kwargs:
            return build(args)
        return build(bind(forward_signature(model), args, kwargs))

    optimized = make_optimized(model, build_at_first_call)
    try:
        optimized.install(build(example_inputs))
    except NotCapturedError:
        if example_inputs is not None:
            raise
    return optimized


class _Pipeline:
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
        self.compiled: Callable[..., Any] | None = None
        self.trials: tuple[Trial, ...] = ()
        self.last_trials: tuple[Trial, ...] = ()
        self.outputs: list[tuple[Tensor, ...]] = []
        self.unrounded: tuple[Claim, list[tuple[Tensor, ...]]] | None = None

    def capture(self, inputs: Inputs | None, mode: Mode, more: Sequence[Inputs]) -> None:
        """Capture the model (or continue from its program) and judge the capture itself."""
        self.progress(f"capturing {type(self.model).__name__}")
        start = time.perf_counter()
        if isinstance(self.model, Optimized) and self.model.is_captured:
            program = replace(self.model.program, changes=Changes())
        else:
            program = capture(self.model, inputs, mode)
        wellformed.check(program)
        self.capture_ms = _since(start)
        self.program = self.captured = program
        self.notes += program.notes
        claim: Claim = Close()
        verdict = None
        if self.verify:
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
                raise EquivalenceError(_violation_text("the capture", verdict, ()))
        size = {"operations": program.node_count()}
        self._record("capture", "capture", program, program, claim, verdict, start, (), (), size)

    def run(self, pass_: Pass) -> None:
        """Plan, apply, check and judge one pass."""
        if isinstance(pass_, Lower):
            if not any(isinstance(other, SelectKernels) for other in self.passes):
                self._rewrite(SelectKernels(), quiet=True)
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
                raise EquivalenceError(_violation_text(repr(pass_), verdict, blames))
            after, verdict, outputs, reverted = self._revert(pass_, plan, before, verdict, blames)
        if quiet and not after.changes.fired:
            return
        if rounds_activations(after) and not rounds_activations(before):
            self.unrounded = (pass_.claim, self.outputs)
        self.program, self.outputs = after, outputs
        self.claims.append(pass_.claim)
        self._record(
            pass_.name, repr(pass_), before, after, pass_.claim, verdict, start, reverted, ()
        )

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
        if isinstance(pass_.claim, Close) and rounds_activations(before):
            verdict = judge_nodes(pass_.claim, before, after, self.trials)
            if verdict is not None:
                outputs = run_program(after)([trial.inputs for trial in self.trials])
                return after, verdict, [tuple(output) for output in outputs]
        return after, *self._judge(pass_.claim, self.outputs, run_program(after))

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
            # Fused rounding decides ties by other last bits; see judge_nodes. A compiled program
            # can't be judged node by node, so it is held to the rounding pass's own claim.
            claim, reference = self.unrounded or (options.claim, self.outputs)
            run = one_by_one(_runner(lowered.callable, self.program, self.module))
            verdict, self.outputs = self._judge(claim, reference, run)
            if not verdict.holds:
                raise EquivalenceError(_violation_text(repr(options), verdict, ()))
        self.lowering, self.compiled = options, lowered.callable
        self.claims.append(options.claim)
        self._record(
            options.name, repr(options), self.program, self.program, claim, verdict, start,
            (), lowered.warnings, lowered.kernels or {"operations": self.program.node_count()},
        )  # fmt: skip

    def finish(self, measure_cost: bool | None) -> Outcome:
        """Judge the whole list against the original, measure, and write the report."""
        if self.lowering is None:
            self.program = self.program.materialized()
            self.module = graph_module(self.program)
        end_to_end = self._judge_whole() if self.verify else None
        self.program = replace(self.program, changes=Changes(), notes=tuple(self.notes))
        report = Report(
            model=self.program.name,
            capture_ms=self.capture_ms,
            steps=tuple(step.record for step in self.steps),
            end_to_end=end_to_end,
            notes=tuple(self.notes),
            fingerprint=measure.fingerprint(),
            picture_before=picture(self.captured, self._gone_nodes()),
            picture_after=picture(self.program, self._changed_nodes()),
        )
        if measure_cost or (measure_cost is None and self.lowering is not None):
            report = self._with_cost(report)
        return Outcome(
            self.program, report, tuple(self.steps), self.lowering, self.compiled, self.module
        )

    def _judge_whole(self) -> str:
        budget = self.budget or compose(self.claims)
        every = (*self.trials, *self.last_trials)
        outputs: list[Sequence[Tensor]] = [*self.outputs]
        if self.last_trials:
            run = run_program(self.program)
            if self.compiled is not None:
                run = one_by_one(_runner(self.compiled, self.program, self.module))
            outputs += run([trial.inputs for trial in self.last_trials])
        kept = [list(output) for output in outputs]
        reference = [trial.outputs for trial in every]
        names = output_names(self.program)
        verdict, _ = judge(budget, every, reference, lambda batches: kept, names)
        if not verdict.holds:
            raise EquivalenceError(
                _violation_text("the whole list", verdict, ())
                + "\n  each pass kept its own claim, but their sum is over the budget: loosen "
                "budget=, or drop or tighten a pass"
            )
        return f"{budget}; measured {verdict.measured.text} over {len(every)} inputs"

    def _with_cost(self, report: Report) -> Report:
        self.progress("measuring latency and memory")
        example = self.program.example
        run = self.compiled or self.module
        before = run_model(self.model, self.program)

        def after() -> object:
            with torch.no_grad():
                return run(*example)

        systems: dict[str, Callable[[], object]] = {
            "before": lambda: before(example),
            "after": after,
        }
        device = example[0].device if example else torch.device("cpu")
        with state_kept(self.program, example, dict(self.module.named_buffers())):
            latency = measure.latency(systems)
            memory = {name: measure.peak_memory(call, device) for name, call in systems.items()}
        return replace(
            report,
            latency_before=latency["before"],
            latency_after=latency["after"],
            memory_before=memory["before"],
            memory_after=memory["after"],
        )

    def _record(
        self,
        name: str,
        spec: str,
        before: Program,
        after: Program,
        claim: Claim,
        verdict: Verdict | None,
        start: float,
        reverted: tuple[Refusal, ...],
        warnings: tuple[str, ...],
        kernels: Mapping[str, int] | None = None,
    ) -> None:
        old_names = {node.name for node in before.graph.nodes}
        changed = tuple(node.name for node in after.graph.nodes if node.name not in old_names)
        if verdict is not None:
            measured = verdict.measured.text
        else:
            measured = "unchanged" if self.verify else "not judged"
        step = Step(
            name=name,
            spec=spec,
            fired=kernels if kernels is not None else after.changes.fired,
            refused=after.changes.refused,
            reverted=reverted,
            nodes_before=before.node_count(),
            nodes_after=after.node_count(),
            bytes_before=before.parameter_bytes(),
            bytes_after=after.parameter_bytes(),
            claim=str(claim),
            measured=measured,
            holds=verdict is None or verdict.holds,
            milliseconds=_since(start),
            warnings=warnings,
            graph=text(after),
            changed=changed,
        )
        self.steps.append(OptimizedStep(step, GraphText(after.outline())))

    def _changed_nodes(self) -> frozenset[str]:
        return frozenset(name for step in self.steps for name in step.record.changed)

    def _gone_nodes(self) -> frozenset[str]:
        left = {node.name for node in self.program.graph.nodes}
        return frozenset({node.name for node in self.captured.graph.nodes} - left)

    def _flat(self, inputs: Inputs) -> list[Tensor]:
        signature = self.program.signature
        return signature.flatten((), normalize_inputs(signature.forward, inputs))


def _runner(
    run: Callable[..., Any], program: Program, module: nn.Module
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), state_kept(program, inputs, dict(module.named_buffers())) as kept:
            return [output.clone() for output in run(*inputs)] if kept else list(run(*inputs))

    return call


def _same(before: Program, after: Program) -> bool:
    return (
        after.graph is before.graph
        and after.state.keys() == before.state.keys()
        and all(after.state[name] is tensor for name, tensor in before.state.items())
    )


def _violation_text(who: str, verdict: Verdict, blames: Sequence[Blame]) -> str:
    lines = [
        f"{who} broke its claim",
        f"  claimed: {verdict.claim}",
        f"  measured: {verdict.measured.text}, in {verdict.where} on {verdict.trial.what}",
    ]
    if blames:
        worst = blames[0]
        lines.append(f"  guilty node ({worst.db:.1f} dB on its own): {worst.text}")
    return "\n".join(lines)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
