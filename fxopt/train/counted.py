"""Which positions of a batch count: no padding, no label of -100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxopt.errors import TrainError

_IGNORED = -100


def counted_tokens(inputs: Mapping[str, Any], states: Tensor, model: nn.Module) -> Tensor | None:
    """Bool `[batch, tokens]` of `[batch, tokens, width]` states; None where every one counts."""
    mask = _mask(inputs, model)
    if mask is None or states.ndim != 3 or mask.ndim != 2:
        return None
    if mask.shape != states.shape[:2]:
        raise TrainError(_misfit("hidden states", mask, states))
    return mask.bool()


def counted_queries(inputs: Mapping[str, Any], attention: Tensor, model: nn.Module) -> Any:
    """Bool `[batch, queries]` of `[batch, heads, queries, keys]`; None where every one counts."""
    mask = _mask(inputs, model)
    if mask is None or mask.shape != (attention.shape[0], attention.shape[2]):
        return None
    return mask.bool()


def counted_logits(
    inputs: Mapping[str, Any], logits: Tensor, model: nn.Module, next_token: bool | None
) -> Tensor | None:
    """Bool `[batch, tokens]` of `[batch, tokens, classes]` logits; None where every row counts."""
    if logits.ndim != 3:
        return None
    rows = logits.shape[:2]
    mask, labels = _mask(inputs, model), inputs.get("labels")
    keep = mask.bool() if mask is not None and mask.shape == rows else None
    if isinstance(labels, Tensor) and labels.shape == rows:
        if next_token or (next_token is None and predicts_next_token(model)):
            has_label = labels.roll(-1, 1) != _IGNORED
            has_label[:, -1] = False  # the last position predicts what isn't there
        else:
            has_label = labels != _IGNORED
        return has_label if keep is None else keep & has_label
    if keep is None and mask is not None and mask.ndim == 2:
        raise TrainError(_misfit("logits", mask, logits))
    return keep


def predicts_next_token(model: nn.Module) -> bool:
    """Whether transformers lists the class of `model` among its causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = type(model).__name__.removeprefix("Optimized")
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _mask(inputs: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) else None


def _misfit(what: str, mask: Tensor, values: Tensor) -> str:
    return (
        f"attention_mask has shape {tuple(mask.shape)}, but the {what} have shape "
        f"{tuple(values.shape)}, so that padding can't be told. Leave attention_mask out of the "
        "batch, or give it the shape of the tokens"
    )
