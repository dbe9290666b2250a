"""The pipeline: what a list of passes makes of a captured model, stage by stage."""

from __future__ import annotations

from fxopt.optimized import PipelineResult
from fxopt.pass_list import Schedule
from fxopt.pipeline.finishing import finished
from fxopt.pipeline.lowering import lowered
from fxopt.pipeline.rewriting import rewritten
from fxopt.pipeline.run import Judging, Run


def completed(
    run: Run, schedule: Schedule, judging: Judging, measure_cost: bool | None
) -> PipelineResult:
    """The captured `run` through all stages of `schedule`; raises what they raise."""
    for pass_ in schedule.rewrites:
        run = rewritten(run, pass_, judging)
    if schedule.lowering is not None:
        run = lowered(run, schedule.lowering, judging)
    return finished(run, judging, measure_cost)
