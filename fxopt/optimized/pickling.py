"""An optimised module in a pickle: the graph as `save` writes it, its tensors as torch does.

So `torch.save(opt, file)`, `pickle`, `copy` and processes started by spawn take the module whole,
in both of its modes. A pickle is code to whoever loads it; a folder of `opt.save` is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxopt.lower import Lower
from fxopt.optimized.optimized import Optimized, optimized_like
from fxopt.optimized.outcome import Evaluation, Outcome
from fxopt.program import Program
from fxopt.report import Report
from fxopt.saving import from_documents, state_of, to_documents


@dataclass(frozen=True)
class Pickled:
    """What goes into a pickle; `program` and `report` are JSON, `evaluation` as `save` has it."""

    program: str
    evaluation: str | None
    report: str
    state: Mapping[str, Tensor]
    example: tuple[Tensor, ...]
    lowering: Lower | None
    carried: dict[str, Any]
    training: bool

    def restored(self) -> Optimized:
        """The module, lowered again at its first call where it was."""
        data = {**json.loads(self.program), "evaluation": json.loads(self.evaluation or "null")}
        program, evaluation = from_documents(data, self.state, self.example)
        twin = optimized_like(program.name, program.signature.forward, dict(self.carried))
        report, kept = Report.from_json(self.report), Evaluation.saved(evaluation)
        twin.install(Outcome(program, report, (), self.lowering, evaluation=kept))
        return twin.train(self.training)


def reduced(
    program: Program,
    evaluation: Program | str | None,
    outcome: Outcome,
    carried: Mapping[str, Any],
    training: bool,
) -> tuple[Callable[[Pickled], Optimized], tuple[Pickled]]:
    """The module of `program` for the pickle protocol; `SaveError` where it has no saved form."""
    program = program.materialized()
    document = to_documents(program, evaluation)
    evaluated = document.pop("evaluation")
    pickled = Pickled(
        program=json.dumps(document),
        evaluation=json.dumps(evaluated),
        report=outcome.report.to_json(),
        state=state_of(program, evaluation),
        example=program.example,
        lowering=outcome.lowering,
        carried=dict(carried),
        training=training,
    )
    return Pickled.restored, (pickled,)
