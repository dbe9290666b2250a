"""One transformation: capture, each pass with its judgement, lowering, the ending."""

from fxopt.pipeline.capturing import begun, captured, captured_alone
from fxopt.pipeline.finishing import finished, with_source
from fxopt.pipeline.lowering import lowered
from fxopt.pipeline.pipeline import completed
from fxopt.pipeline.rewriting import rewritten
from fxopt.pipeline.run import Judging, OnViolation, Run

__all__ = [
    "Judging",
    "OnViolation",
    "Run",
    "begun",
    "captured",
    "captured_alone",
    "completed",
    "finished",
    "lowered",
    "rewritten",
    "with_source",
]
