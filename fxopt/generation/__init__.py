"""Text generation: a language model as steps behind a cache. Needs transformers."""

from fxopt.generation.cache import PrefixCache, append
from fxopt.generation.plan import GenerationPlan, generation_plan
from fxopt.generation.prefix import (
    LayerShape,
    Positions,
    empty_cache,
    is_int8,
    positions_of,
    prefix,
)
from fxopt.generation.proof import teacher_forced

__all__ = [
    "GenerationPlan",
    "LayerShape",
    "Positions",
    "PrefixCache",
    "append",
    "empty_cache",
    "generation_plan",
    "is_int8",
    "positions_of",
    "prefix",
    "teacher_forced",
]
