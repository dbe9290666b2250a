"""A language model that is read a few tokens at a time behind a cache, whoever's it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.calls import generates
from fxopt.errors import MeasureError
from fxopt.optimized import Optimized


class TextReader:
    """Reads text with `model`, which remembers it in a cache of its own kind.

    Positions are those that the model takes by itself, as where it reads a whole text at once. With
    `last_only` it asks for the logits of the last slot alone, where the model lets it.
    """

    def __init__(self, model: Any, last_only: bool = False) -> None:
        self.model = model
        # torch.compile wraps the model whose arguments are known.
        parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
        keeps = last_only and "logits_to_keep" in parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self.forget()

    def forget(self) -> None:
        """Begin anew, with an empty cache."""
        self.cache = _empty_cache(self.model)
        self._seen: Tensor | None = None

    def read(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits [B, K, V] of ids [B, S] behind what was read; `seen` is false at padding."""
        new = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen
        self._seen = new if self._seen is None else torch.cat([self._seen, new], 1)
        output = self.model(
            input_ids=ids,
            attention_mask=self._seen.long(),
            past_key_values=self.cache,
            use_cache=True,
            **self._options,
        )
        self.cache = output.past_key_values
        return output.logits  # type: ignore[no-any-return]

    def forget_last(self, count: int) -> None:
        """Forget the last `count` slots."""
        assert self._seen is not None
        self._seen = self._seen[:, :-count]
        if self._seen.shape[1]:
            self.cache.crop(-count)
        else:
            self.forget()


def why_unreadable(model: Any) -> str | None:
    """Why `model` can't be read step by step; None where it can."""
    kind = type(model).__name__
    if isinstance(model, Optimized) and not hasattr(model, "as_step"):
        return (
            f"{kind} answers single calls; a causal language model goes on to generate where it is "
            "transformed without example_inputs, or with generation=True"
        )
    config = getattr(model, "config", None)
    if config is None or not generates(model):
        return (
            "only a causal language model of transformers and what fxopt.transform makes of it "
            f"write text, and {kind} is neither"
        )
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} has an encoder, and only decoders alone are read so far"
    return None


def text_in(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, T] and which of them aren't padding, bool [B, T], of a batch; no labels.

    Raises `MeasureError`, which calls the batch `where`, for anything else than text.
    """
    named = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    others = sorted(map(str, named.keys() - {"input_ids", "attention_mask", "labels"}))
    is_text = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    if not isinstance(ids, Tensor) or not is_text or others:
        raise MeasureError(
            f"{where} must be text, input_ids [batch, length] and perhaps attention_mask, to be "
            f"read token by token, not {', '.join(others) or 'other tensors'}"
        )
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def cache_bytes(cache: Any) -> int:
    """Bytes of the filled slots of `cache`; room for more isn't counted."""
    held = [
        tensor
        for layer in cache.layers
        for tensor in getattr(layer, "held", (layer.keys, layer.values))
    ]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in held)


def _empty_cache(model: Any) -> Any:
    if isinstance(model, Optimized):
        return None  # it makes its own
    from transformers import DynamicCache

    return DynamicCache()  # without windows, which can't be cropped
