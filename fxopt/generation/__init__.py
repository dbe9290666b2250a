"""Text generation: a language model as steps behind a cache. Needs transformers."""

from fxopt.generation.cache import PrefixCache, append, prefix_of
from fxopt.generation.examples import BLANK, LayerShape, Reader, blank_prefix, text_of
from fxopt.generation.plan import GenerationPlan, generation_plan
from fxopt.generation.proof import TeacherForcing, teacher_forced
from fxopt.generation.seam import step_of

__all__ = [
    "BLANK",
    "GenerationPlan",
    "LayerShape",
    "PrefixCache",
    "Reader",
    "TeacherForcing",
    "append",
    "blank_prefix",
    "generation_plan",
    "prefix_of",
    "step_of",
    "teacher_forced",
    "text_of",
]
