"""Optimized, the module that takes the original's place, and what it is made of."""

from fxopt.optimized.graph_modules import graph_module, graph_over
from fxopt.optimized.loading import load
from fxopt.optimized.optimized import Optimized, make_optimized
from fxopt.optimized.origins import Origins
from fxopt.optimized.outcome import OptimizedStep, Outcome
from fxopt.optimized.source import MOST_PROGRAMS, Source

__all__ = [
    "MOST_PROGRAMS",
    "Optimized",
    "OptimizedStep",
    "Origins",
    "Outcome",
    "Source",
    "graph_module",
    "graph_over",
    "load",
    "make_optimized",
]
