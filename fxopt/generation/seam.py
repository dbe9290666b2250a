"""The seam: a language model of transformers, seen as one step on what it has read so far.

    step(ids, positions, keep, seen, past_seen, keys, values)  =  logits, new keys, new values

A step is a function without state. It reads `ids` [B, S] behind a prefix of P slots, whose keys and
values it is given layer by layer, and returns those of the S new slots: whoever calls it appends
them. One graph of it holds for any prefix, whether that was read at once or token by token, in
rows of a batch that were reordered, cropped or padded.

Keys and values come and go slot by slot, [P, B, G, D]: the filled beginning of memory with room for
more slots is contiguous then, whatever the room, so that code compiled for one is for all.

It is the model's own forward. Two seams make it so: a `Cache` that hands new keys and values
through and notes them, and an attention implementation that reads prefix and new slots in one
operator, `fxopt.cached_attention`. With an attention that it doesn't know transformers makes no
masks of its own.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fxopt.errors import ModelError
from fxopt.generation.cache import CACHE, by_head, by_slot

ATTENTION = "fxopt"
"""The name under which transformers knows the attention of a step."""

_KNOWN = frozenset({"sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "use_cache"})
"""Keywords of an attention that are taken into account, or that say nothing about its values."""

active: ContextVar[StepCache] = ContextVar("the cache of the step that runs")


class StepCache(Cache):
    """What one step knows of earlier slots; it hands new keys and values through and notes them."""

    def __init__(
        self,
        past_seen: Tensor,
        seen: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scales: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.past_seen, self.seen = past_seen, seen
        self.past_keys, self.past_values, self.scales = keys, values, scales
        self.new_keys: dict[int, Tensor] = {}
        self.new_values: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values [B, G, S, D] themselves; the attention adds the prefix."""
        self.new_keys[layer_idx], self.new_values[layer_idx] = key_states, value_states
        return key_states, value_states

    def past(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, P, D] of the prefix of a layer in `dtype`."""
        keys, values = by_head(self.past_keys[layer]), by_head(self.past_values[layer])
        if self.scales is None:
            return keys, values
        of_keys, of_values = (by_head(side[layer].unsqueeze(-1)) for side in self.scales)
        return (
            torch.ops.fxopt.dequantize(keys, of_keys, dtype),
            torch.ops.fxopt.dequantize(values, of_values, dtype),
        )

    def new_slots(self, kind: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The new keys and values [S, B, G, D] of every layer.

        Raises `ModelError`, which names the model's `kind`, where it kept those of some alone.
        """
        layers = range(len(self.past_keys))
        if self.new_keys.keys() != set(layers):
            raise ModelError(f"{kind} keeps no keys and values of some layers")
        return (
            tuple(by_slot(self.new_keys[layer]) for layer in layers),
            tuple(by_slot(self.new_values[layer]) for layer in layers),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many slots the prefix has."""
        return self.past_seen.shape[1]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the S new slots [B, H, S, D] to prefix and new slots, as [B, S, H, D].

    Raises `ModelError` for what a step can't hold: a mask of the model's own, attention that isn't
    causal, a keyword that changes it in a way not known here.
    """
    cache = active.get()
    layer: Any = getattr(module, "layer_idx", None)
    kind = type(module).__name__
    if layer not in cache.new_keys or cache.new_keys[layer] is not key:
        raise ModelError(f"{kind} attends to other keys than those it gives to the cache")
    if attention_mask is not None:
        raise ModelError(f"{kind} makes an attention mask of its own")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ModelError(f"{kind} attends to later tokens too")
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _KNOWN:
            raise ModelError(f"{kind} gives its attention {name}, which no step takes")
    window = kwargs.get("sliding_window")
    _check_window(module, layer, window)
    attended = torch.ops.fxopt.cached_attention(
        query,
        key,
        value,
        *cache.past(layer, key.dtype),
        cache.past_seen,
        cache.seen,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return attended, None


def _check_window(module: nn.Module, layer: int, window: int | None) -> None:
    """Raise `ModelError` where the config hides distant slots in a way that `window` isn't.

    Text that is shorter than a window would not show it.
    """
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    asked = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kind = kinds[layer] if kinds else ("sliding_attention" if asked else "full_attention")
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelError(f"{type(module).__name__} has {kind}, which hides slots as no step does")
    if kind == "sliding_attention" and window is None:
        raise ModelError(f"{type(module).__name__} has a window that its attention isn't told of")


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class _OneCall:
    """A call of a model's own forward over a `StepCache`."""

    def _read(
        self, cache: StepCache, input_ids: Tensor, position_ids: Tensor, keep: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        forward: Any = super().forward  # type: ignore[misc]
        keeps = "logits_to_keep" in inspect.signature(forward).parameters
        given = {"logits_to_keep": keep} if keeps else {}
        with stepping(self, cache):  # type: ignore[arg-type]
            output = forward(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=True,
                return_dict=True,
                **{CACHE: cache},
                **given,
            )
        new = cache.new_slots(type(self).__name__)
        return (output.logits if keeps else output.logits[:, keep], *new)


class Step(_OneCall):
    """The forward of a step, in front of a model's own class."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        seen: Tensor,
        past_seen: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits [B, K, V] at the K new slots `keep`, and the new keys and values [S, B, G, D].

        `input_ids` and `position_ids` are int64 [B, S], `keep` int64 [K] in 0 to S - 1; `seen`
        [B, S] and `past_seen` [B, P] are false where a slot is padding, which nothing attends to.
        `keys` and `values` hold the prefix of each layer, [P, B, G, D].
        """
        return self._read(StepCache(past_seen, seen, keys, values), input_ids, position_ids, keep)


class Int8Step(_OneCall):
    """A step whose prefix is given in int8."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        seen: Tensor,
        past_seen: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        key_scales: tuple[Tensor, ...],
        value_scales: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `Step.forward`, with int8 `keys` and `values` and their float32 scales [P, B, G].

        New keys and values come as the model computes them: whoever appends them rounds.
        """
        cache = StepCache(past_seen, seen, keys, values, (key_scales, value_scales))
        return self._read(cache, input_ids, position_ids, keep)


@contextmanager
def stepping(model: nn.Module, cache: StepCache, name: str = ATTENTION) -> Iterator[None]:
    """The attention called `name` stands in for that of `model` and reads `cache`.

    The configs of `model` are put back in the end.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = active.set(cache)
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        active.reset(token)
        for key, config in configs.items():
            config._attn_implementation = before[key]


_steps: weakref.WeakKeyDictionary[nn.Module, dict[type, nn.Module]] = weakref.WeakKeyDictionary()


def step_of(model: nn.Module, kind: type = Step) -> nn.Module:
    """`model` with the forward of `kind`: the same modules and tensors, under the same names.

    It is kept for as long as somebody holds `model`. One that was transformed is its own steps,
    whose prefix is what it was then.
    """
    known = _steps.setdefault(model, {})
    if kind not in known:
        if hasattr(model, "as_step"):
            transformed: Any = model
            known[kind] = transformed.as_step()
        else:
            known[kind] = step = copy.copy(model)
            step.__class__ = type(type(model).__name__, (kind, type(model)), {})
    return known[kind]
