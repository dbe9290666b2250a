"""What a step is told of the slots before its own: keys, values, which are seen, positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from fxopt.errors import ModelError
from fxopt.generation.cache import CACHE, PrefixCache, prefix_of

BLANK = 2
"""Slots of a prefix that is empty. One would be a size for which code is compiled anew."""


@dataclass(frozen=True)
class LayerShape:
    """Heads, size of a key, size of a value and dtype of what one layer keeps of a slot.

    What is kept in int8 has a float32 scale for each head.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype


def is_int8(shapes: tuple[LayerShape, ...]) -> bool:
    """Whether keys and values are kept in int8."""
    return shapes[0].dtype == torch.int8


def empty_cache(shapes: tuple[LayerShape, ...]) -> PrefixCache:
    """A cache for layers of these shapes."""
    return PrefixCache(is_int8(shapes))


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of `model` are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def layer_shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    """What each layer of `model` keeps of a slot, found by a call with one token.

    Raises `ModelError` where it keeps something else than keys and values.
    """
    if hasattr(model, "as_step"):
        transformed: Any = model
        return tuple(transformed.kept_shapes())
    cache: Any = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
    kind = type(model).__name__
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **{CACHE: cache})
    except Exception as error:  # a model's own code raises whatever it stumbles over
        raise ModelError(f"{kind} doesn't take a cache of keys and values: {error}") from error
    held: list[Any] = [
        (getattr(one, "keys", None), getattr(one, "values", None)) for one in cache.layers
    ]
    if not held or any(k is None or v is None or k.dim() != 4 for k, v in held):
        raise ModelError(f"{kind} keeps other state than keys and values of its layers")
    return tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype) for k, v in held)


def _blank(
    shapes: tuple[LayerShape, ...], rows: int, device: torch.device
) -> tuple[tuple[Tensor, ...], ...]:
    """Keys and values of `BLANK` slots that nothing attends to: what stands for an empty prefix.

    Of int8 ones the scales come after them. Each is a tensor of its own, as those of later steps
    are: code is compiled for what is shared.
    """

    def of(heads: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(BLANK, rows, heads, size, dtype=dtype, device=device)

    blank = (
        tuple(of(one.heads, one.key_size, one.dtype) for one in shapes),
        tuple(of(one.heads, one.value_size, one.dtype) for one in shapes),
    )
    if not is_int8(shapes):
        return blank
    scales = (tuple(of(one.heads, 1, torch.float32) for one in shapes) for _ in blank)
    return (*blank, *scales)


def prefix(
    shapes: tuple[LayerShape, ...], cache: Cache | None, seen: Tensor
) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
    """Which slots are seen, and keys and values of the P slots that `cache` holds, and in int8 the
    scales of each; `seen` is [B, P].

    A prefix has `BLANK` slots at least, so that one program reads all. The missing ones, which
    nothing attends to, come first: windows count the slots in between.
    """
    rows, held = seen.shape
    if cache is None or not held:
        sides = _blank(shapes, rows, seen.device)
        return seen.new_zeros(rows, BLANK), _with_flat_scales(sides)
    sides = prefix_of(cache, len(shapes), is_int8(shapes))
    missing = BLANK - held
    if missing > 0:
        seen = pad(seen, (missing, 0))
        sides = tuple(
            tuple(pad(one, (0, 0, 0, 0, 0, 0, missing, 0)) for one in side) for side in sides
        )
    return seen, _with_flat_scales(sides)


def _with_flat_scales(sides: tuple[tuple[Tensor, ...], ...]) -> tuple[tuple[Tensor, ...], ...]:
    """Scales as [P, B, G]: an axis of size 1 would be one for which code is compiled anew."""
    scales = (tuple(one.squeeze(-1) for one in side) for side in sides[2:])
    return (*sides[:2], *scales)


PREFIX = ("keys", "values", "key_scales", "value_scales")
"""What a step calls the sides of its prefix; scales are of those in int8."""

Positions = Literal["slots", "seen", "unknown"]
"""What counts a position where a call gives none: each slot, or those that aren't padding."""


def positions_of(seen: Tensor) -> Tensor:
    """Positions int64 [B, T] that count what is seen, as `generate` has them."""
    return (seen.long().cumsum(-1) - 1).clamp(min=0)
