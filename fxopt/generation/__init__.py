"""Text generation: a language model as steps behind a cache. Needs transformers."""

from fxopt.generation.cache import PrefixCache, append
from fxopt.generation.plan import GenerationPlan
from fxopt.generation.planning import generation_plan
from fxopt.generation.prefix import (
    LayerShape,
    Positions,
    empty_cache,
    is_int8,
    positions_of,
    prefix,
)
from fxopt.generation.proof import teacher_forced
from fxopt.generation.seq2seq_plan import Seq2SeqPlan, hears

__all__ = [
    "GenerationPlan",
    "LayerShape",
    "Positions",
    "PrefixCache",
    "Seq2SeqPlan",
    "append",
    "empty_cache",
    "generation_plan",
    "hears",
    "is_int8",
    "positions_of",
    "prefix",
    "teacher_forced",
]
