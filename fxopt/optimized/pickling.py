"""An optimised module in a pickle: the graph as `save` writes it, its tensors as torch does.

So `torch.save(opt, file)`, `pickle`, `copy` and processes started by spawn take the module whole,
in both of its modes. A pickle is code to whoever loads it; a folder of `opt.save` is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxopt.lower import Lowering
from fxopt.optimized.pipeline_result import Evaluation, PipelineResult
from fxopt.program import Program
from fxopt.report import Report
from fxopt.saving import (
    decode_beside,
    decode_further,
    document_beside,
    first_of,
    from_document,
    tensors_beside,
    tensors_of,
    to_document,
)


@dataclass(frozen=True)
class Pickled:
    """What goes into a pickle; `program`, `further` ones of other branches, the `evaluation` beside
    it and `report` are JSON."""

    program: str
    evaluation: str
    report: str
    state: Mapping[str, Tensor]
    example: tuple[Tensor, ...]
    lowering: Lowering | None
    carried: dict[str, Any]
    training: bool
    further: str = "[]"

    def outcome(self) -> PipelineResult:
        """What the module held; lowered again at its first call where it was."""
        state = first_of(self.state)
        program = from_document(json.loads(self.program), state, self.example)
        others = decode_further(json.loads(self.further), self.state, from_document)
        beside = decode_beside(json.loads(self.evaluation), self.state, program, from_document)
        report = Report.from_json(self.report)
        further = tuple(
            PipelineResult(one, replace(report, domains=()), (), self.lowering) for one in others
        )
        kept = Evaluation.saved(beside)
        return PipelineResult(program, report, (), self.lowering, evaluation=kept, further=further)


def pickled(
    programs: Sequence[Program],
    evaluation: Program | str | None,
    outcome: PipelineResult,
    carried: Mapping[str, Any],
    training: bool,
) -> Pickled:
    """The module of `programs` for a pickle; raises `SaveError` where it has no saved form."""
    program, *further = [one.materialized() for one in programs]
    state = {name: program.tensor(name) for name in program.state}
    return Pickled(
        program=json.dumps(to_document(program)),
        evaluation=json.dumps(document_beside(evaluation)),
        report=outcome.report.to_json(),
        state=state | tensors_of(further) | tensors_beside(evaluation),
        example=program.example,
        lowering=outcome.lowering,
        carried=dict(carried),
        training=training,
        further=json.dumps([to_document(one) for one in further]),
    )
