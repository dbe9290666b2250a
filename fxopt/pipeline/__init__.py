"""One transformation: capture, each pass with its judgement, lowering, the ending."""

from fxopt.pipeline.capturing import captured
from fxopt.pipeline.pipeline import completed
from fxopt.pipeline.run import Judging, OnViolation, Run

__all__ = ["Judging", "OnViolation", "Run", "captured", "completed"]
