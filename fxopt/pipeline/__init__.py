"""One transformation under way: capture, each pass with its judgement, lowering, the ending."""

from fxopt.pipeline.pipeline import Inputs, OnViolation, Pipeline, Progress

__all__ = ["Inputs", "OnViolation", "Pipeline", "Progress"]
