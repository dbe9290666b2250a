"""One transformation: capture, each pass with its judgement, lowering, the ending."""

from fxopt.pipeline.capturing import captured
from fxopt.pipeline.pipeline import completed
from fxopt.pipeline.run import Judging, OnViolation, Progress, Run

__all__ = ["Judging", "OnViolation", "Progress", "Run", "captured", "completed"]
