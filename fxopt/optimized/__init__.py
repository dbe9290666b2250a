"""Optimized, the module that takes the original's place, and what it is made of."""

from fxopt.graph_modules import graph_module, graph_over
from fxopt.optimized.loading import load
from fxopt.optimized.optimized import Optimized, evaluation_of, make_optimized
from fxopt.optimized.origins import Origins
from fxopt.optimized.pipeline_result import Evaluation, OptimizedStep, PipelineResult
from fxopt.optimized.source import MOST_PROGRAMS, Source

__all__ = [
    "MOST_PROGRAMS",
    "Evaluation",
    "Optimized",
    "OptimizedStep",
    "Origins",
    "PipelineResult",
    "Source",
    "evaluation_of",
    "graph_module",
    "graph_over",
    "load",
    "make_optimized",
]
