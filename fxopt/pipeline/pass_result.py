"""A pass carried out on the program so far, checked and judged.

What a pass is held to is the program before it or, for one that changes outputs by intent, its
oracle. A pass that changes the shape of what dropout draws for changes the draws of everything
behind it; then both sides are judged without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fxopt import wellformed
from fxopt.analyses.precision import rounds_activations
from fxopt.claim import Exact, sqnr
from fxopt.errors import PassError
from fxopt.eval_graph import without_dropout
from fxopt.program import Changes, Program
from fxopt.rewriting import Pass, Plan
from fxopt.verify import (
    Blame,
    Trial,
    Verdict,
    blame,
    draws_alike,
    judge,
    judge_gradients,
    judge_nodes,
    output_names,
    run_program,
)

Outputs = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class PassResult:
    """The program `after` a pass, its `outputs` on the trials, and the verdict on it.

    `verdict` is None where there was nothing to judge, or judging is off; `oracle` is what the
    pass means to compute where that isn't what the program before it does; `compared` holds the
    programs before, after and the oracle as they were judged; `redrawn` says that this was without
    dropout.
    """

    after: Program
    outputs: Outputs
    verdict: Verdict | None = None
    oracle: Program | None = None
    compared: tuple[Program, Program, Program | None] | None = None
    redrawn: bool = False
    details: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no claim was found broken."""
        return self.verdict is None or self.verdict.holds

    def blames(self) -> list[Blame]:
        """The nodes that differ from what they stand for, the worst first."""
        assert self.verdict is not None
        assert self.compared is not None
        before, after, oracle = self.compared
        return blame(before, after, self.verdict.trial, oracle)


def carry_out(
    pass_: Pass,
    plan: Plan,
    before: Program,
    trials: Sequence[Trial],
    outputs: Outputs,
    verify: bool,
) -> PassResult:
    """Carry out `plan` on `before`, whose `outputs` on the trials are known, and judge the result.

    Raises `PassError` for a pass that edits without the driver, `WellFormedError` for what it or
    its oracle builds outside the dialect.
    """
    before = replace(before, changes=Changes())
    after = pass_.apply(before, plan)
    if not after.changes.fired and not _same(before, after):
        raise PassError(
            f"{pass_!r} returned another program without going through "
            "fxopt.rewriting.rewrite; only the driver may edit, since it counts and keeps "
            "metadata"
        )
    wellformed.check(after)
    if not verify or not after.changes.fired:
        return PassResult(after, outputs)
    oracle = pass_.oracle(before, plan)
    if oracle is not None:
        wellformed.check(oracle)
    redrawn = not draws_alike(oracle or before, after)
    compared = (before, after, oracle)
    if redrawn:
        outputs = outputs_of(without_dropout(before), trials)
        compared = (
            without_dropout(before),
            without_dropout(after),
            oracle and without_dropout(oracle),
        )
    return _judged(
        pass_, compared, trials, outputs, PassResult(after, [], None, oracle, compared, redrawn)
    )


def outputs_of(program: Program, trials: Sequence[Trial]) -> Outputs:
    """What `program` answers on the trials."""
    results = run_program(program)([trial.inputs for trial in trials])
    return [tuple(output.detach() for output in result) for result in results]


def _judged(
    pass_: Pass,
    compared: tuple[Program, Program, Program | None],
    trials: Sequence[Trial],
    outputs: Outputs,
    result: PassResult,
) -> PassResult:
    """`result` with the verdict on it, where `outputs` are those of the program before it."""
    before, after, oracle = compared
    reference = outputs_of(oracle, trials) if oracle is not None else outputs
    verdict, kept = judge(
        pass_.claim, trials, reference, run_program(after), output_names(after), after.state
    )
    details = (_intent(outputs, kept),) if oracle is not None else ()
    rounded = not isinstance(pass_.claim, Exact) and rounds_activations(before)
    nodes = judge_nodes(pass_.claim, before, after, trials, oracle) if rounded else None
    if nodes is not None:
        verdict = nodes
    elif after.mode == "train" and verdict.holds:
        learnt = judge_gradients(pass_.claim, oracle or before, after, trials[0])
        verdict = learnt if learnt is not None and not learnt.holds else verdict
    if result.redrawn and verdict.holds:
        kept = outputs_of(result.after, trials)
    return replace(result, outputs=kept, verdict=verdict, details=details)


def _intent(before: Outputs, after: Outputs) -> str:
    worst = min(
        (
            sqnr(old, new)
            for olds, news in zip(before, after, strict=True)
            for old, new in zip(olds, news, strict=True)
            if old.shape == new.shape and old.is_floating_point()
        ),
        default=float("inf"),
    )
    return f"against the model before it: {worst:.1f} dB (pruning changes outputs by intent)"


def _same(before: Program, after: Program) -> bool:
    return (
        after.graph is before.graph
        and after.state.keys() == before.state.keys()
        and all(after.state[name] is tensor for name, tensor in before.state.items())
    )
