"""What the whole list is held to: the eager original, or what the last oracle makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxopt.claim import Claim
from fxopt.eval_graph import evaluation_mode, without_dropout
from fxopt.pipeline.pass_result import Outputs, PassResult, outputs_of
from fxopt.program import Program
from fxopt.verify import Trial, compose


@dataclass(frozen=True)
class Reference:
    """The `claims` since `oracle`, the program that the pass `by` meant to compute.

    Without one it is the claims of all passes, against the original, which `captured` stands for.
    `redrawn` says that some pass changed what dropout draws for: the program's outputs can then be
    compared with others' without dropout only.
    """

    captured: Program
    claims: tuple[Claim, ...] = ()
    oracle: Program | None = None
    by: str = ""
    redrawn: bool = False

    @property
    def program(self) -> Program:
        """The program whose outputs the claims since then add up from."""
        return self.oracle or self.captured

    @property
    def budget(self) -> Claim:
        """The sum of the claims."""
        return compose(self.claims)

    def plus(self, claim: Claim) -> Reference:
        """This reference with one claim more."""
        return replace(self, claims=(*self.claims, claim))

    def after(self, result: PassResult, claim: Claim, by: str) -> Reference:
        """The reference after a step of the pass `by`: a new one where the step has an oracle."""
        renewed = self
        if result.oracle is not None:
            renewed = replace(self, claims=(), oracle=result.oracle, by=by)
        return replace(renewed.plus(claim), redrawn=self.redrawn or result.redrawn)

    def original(self) -> Reference:
        """The same list held to the original, whatever its passes mean to compute."""
        return replace(self, oracle=None)

    def outputs(self, trials: Sequence[Trial]) -> Outputs:
        """What the trials' outputs should be."""
        if self.redrawn:
            return outputs_of(evaluation_mode(without_dropout(self.program)), trials)
        if self.oracle is None:
            return [trial.outputs for trial in trials]
        return outputs_of(self.oracle, trials)
