"""The result of a pass list: judged against the original, measured, and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt import timing
from fxopt.claim import Claim
from fxopt.errors import EquivalenceError
from fxopt.eval_graph import evaluation_mode, without_dropout
from fxopt.lower import Lowering
from fxopt.optimized import graph_over
from fxopt.pipeline.recording import violation_text
from fxopt.pipeline.reference import Reference
from fxopt.program import Program
from fxopt.report import Report, Step, picture
from fxopt.verify import (
    Trial,
    Verdict,
    call_model,
    judge,
    model_kept,
    one_by_one,
    output_names,
    run_program,
    state_kept,
)


@dataclass(frozen=True)
class Result:
    """What the last pass left: the program, its module and, where lowered, the compiled call."""

    program: Program
    module: fx.GraphModule
    compiled: Callable[..., Any] | None

    def judged(
        self,
        budget: Claim | None,
        held: Reference,
        trials: Sequence[Trial],
        known: Sequence[Sequence[Tensor]],
    ) -> str:
        """The end-to-end verdict over `trials`, of which the first ones' outputs are `known`.

        The reference is `held`; so is the claim, unless there is a `budget`. Raises
        `EquivalenceError` when it isn't kept.
        """
        claim = budget or held.budget
        outputs = [list(output) for output in known]
        last = trials[len(known) :]
        if last:
            run = run_program(self.program)
            if self.compiled is not None:
                run = one_by_one(runner(self.compiled, self.program, self.module))
            outputs += run([trial.inputs for trial in last])
        names = output_names(self.program)
        reference, state = held.outputs(trials), self.program.state
        verdict, _ = judge(claim, trials, reference, lambda batches: outputs, names, state)
        if not verdict.holds:
            raise EquivalenceError(violation_text("the whole list", verdict) + _advice(held))
        by = f", against what {held.by} means to compute" if held.oracle is not None else ""
        return f"{claim}; measured {verdict.measured.text} over {len(trials)} inputs{by}"

    def judged_without_dropout(
        self, claim: Claim, before: Program, lowering: Lowering, trials: Sequence[Trial]
    ) -> Verdict:
        """The verdict on this program compiled by `lowering`, both it and `before` in evaluation.

        Compiled code draws other random numbers than the graph, so that the outputs of a program
        that draws can't be compared.
        """
        program = evaluation_mode(without_dropout(self.program))
        module = graph_over(self.module, program.graph)
        with torch.no_grad():
            run = one_by_one(runner(lowering.compile(module), program, module))
        reference = run_program(evaluation_mode(without_dropout(before)))(
            [trial.inputs for trial in trials]
        )
        return judge(claim, trials, reference, run, output_names(program))[0]

    def reported(
        self,
        captured: Program,
        capture_ms: float,
        steps: tuple[Step, ...],
        end_to_end: str | None,
    ) -> Report:
        """The report of how `captured` became this program; notes are the program's."""
        left = {node.name for node in self.program.graph.nodes}
        gone = frozenset({node.name for node in captured.graph.nodes} - left)
        changed = frozenset(name for step in steps for name in step.changed)
        return Report(
            model=self.program.name,
            capture_ms=capture_ms,
            steps=steps,
            end_to_end=end_to_end,
            notes=self.program.notes,
            fingerprint=timing.fingerprint(),
            picture_before=picture(captured, gone),
            picture_after=picture(self.program, changed),
        )

    def with_cost(self, report: Report, model: nn.Module) -> Report:
        """`report` with the latency and peak memory of `model` and of this result."""
        example = self.program.example
        run = self.compiled or self.module
        before = call_model(model, self.program)

        def after() -> object:
            with torch.no_grad():
                return run(*example)

        systems: dict[str, Callable[[], object]] = {
            "before": lambda: before(example),
            "after": after,
        }
        device = example[0].device if example else torch.device("cpu")
        buffers = dict(self.module.named_buffers())
        with model_kept(model, self.program, example), state_kept(self.program, (), buffers):
            latency = timing.latency(systems)
            memory = {name: timing.peak_memory(call, device) for name, call in systems.items()}
        return replace(
            report,
            latency_before=latency["before"],
            latency_after=latency["after"],
            memory_before=memory["before"],
            memory_after=memory["after"],
        )


def _advice(held: Reference) -> str:
    if held.by and held.oracle is None:
        return (
            f"\n  pruning changes outputs by intent: {held.by} was right about what it means to "
            "compute, but budget= keeps the original's outputs: prune less, loosen budget=, or "
            "leave it out"
        )
    return (
        "\n  each pass kept its own claim, but their sum is over the budget: loosen "
        "budget=, or drop or tighten a pass"
    )


def runner(
    run: Callable[..., Any], program: Program, module: nn.Module
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A compiled program as a function of its inputs that leaves its state as it was."""

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), state_kept(program, inputs, dict(module.named_buffers())) as kept:
            return [output.clone() for output in run(*inputs)] if kept else list(run(*inputs))

    return call
