"""Which plan a model that generates is transformed by."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.generation.plan import GenerationPlan, decoder_plan
from fxopt.generation.seq2seq_plan import seq2seq_plan


def generation_plan(model: nn.Module, prompts: Any = None) -> GenerationPlan:
    """How `model` is stepped; tried on `prompts`, or on text of its own.

    Raises `ModelError` where no step computes what it computes.
    """
    config: Any = getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False)
    return seq2seq_plan(model, prompts) if both else decoder_plan(model, prompts)
