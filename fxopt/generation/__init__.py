"""Text generation: a language model as steps behind a cache. Needs transformers."""

from fxopt.generation.cache import PrefixCache, append, prefix_of
from fxopt.generation.examples import (
    BLANK,
    LayerShape,
    Positions,
    Reader,
    blank_prefix,
    positions_of,
    text_of,
)
from fxopt.generation.plan import GenerationPlan, generation_plan
from fxopt.generation.proof import TeacherForcing, teacher_forced
from fxopt.generation.seam import step_of

__all__ = [
    "BLANK",
    "GenerationPlan",
    "LayerShape",
    "Positions",
    "PrefixCache",
    "Reader",
    "TeacherForcing",
    "append",
    "blank_prefix",
    "generation_plan",
    "positions_of",
    "prefix_of",
    "step_of",
    "teacher_forced",
    "text_of",
]
