"""The cache of a generation: the filled prefix of each layer, in memory that grows by doubling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxopt.calls import CACHE_NAMES
from fxopt.errors import InputError

CACHE = CACHE_NAMES["cache" in CausalLMOutputWithPast.__dataclass_fields__]
"""What this transformers calls the cache that a model takes and returns."""

_LEAST = 64
"""Slots that a layer's memory begins with."""


def by_head(slots: Tensor) -> Tensor:
    """What lies slot by slot, [P, B, G, D], as transformers has it, [B, G, P, D]."""
    return slots.permute(1, 2, 0, 3)


def by_slot(heads: Tensor) -> Tensor:
    """What transformers has as [B, G, P, D] slot by slot, [P, B, G, D]."""
    return heads.permute(2, 0, 1, 3)


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, G, P, D] as the filled part of memory with room for more slots.

    It lies slot by slot, [P, B, G, D]. What is appended is written behind what is there; only where
    the room is used up is that copied, to twice of it. Rows are reordered and repeated as they lie.
    Where keys are no longer the beginning of the memory, the next append takes memory of its own.
    """

    HELD: ClassVar[tuple[str, ...]] = ("keys", "values")
    """The names of the tensors [B, G, P, ...] that hold the slots."""

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that hold the slots."""
        return tuple(getattr(self, name) for name in self.HELD)

    def stored(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        """Slots [..., D] as they are held."""
        return key_states, value_states

    def floats(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, P, D] in floating point."""
        keys: Any = self.keys
        values: Any = self.values
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no slot, in the shapes and dtypes of what comes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, new in zip(self.HELD, self.stored(key_states, value_states), strict=True):
            setattr(self, name, new[:, :, :0])
        self._rooms: dict[str, Tensor] = {}
        self._filled: dict[str, Tensor] = {}  # what was appended last, the beginning of a room
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new slots [B, G, S, D]; returns all keys and values."""
        self.append(by_slot(key_states), by_slot(value_states))
        return self.floats()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append new slots [S, B, G, D]."""
        if not self.is_initialized:
            self.lazy_initialization(by_head(keys), by_head(values))
        for name, new in zip(self.HELD, self.stored(keys, values), strict=True):
            setattr(self, name, self._appended(name, getattr(self, name), new))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` int64 [B] in the place of all."""
        self._map(lambda slots: slots.index_select(1, beam_idx.to(slots.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row `repeats` times."""
        self._map(lambda slots: slots.repeat_interleave(repeats, 1))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        self._map(lambda slots: slots[:, indices])

    def _map(self, change: Any) -> None:
        if self.get_seq_length():
            for name, one in zip(self.HELD, self.held, strict=True):
                setattr(self, name, by_head(change(by_slot(one))))

    def _appended(self, name: str, heads: Tensor, new: Tensor) -> Tensor:
        """`heads` [B, G, P, D] with the slots `new` [S, B, G, D] behind them."""
        room, held = self._rooms.get(name), heads.shape[2]
        length = held + new.shape[0]
        begins = heads is self._filled.get(name) or _begins(room, by_slot(heads))
        if room is None or not begins or room.shape[0] < length:
            room = new.new_empty(max(_LEAST, 2 * length), *new.shape[1:])
            room[:held] = by_slot(heads)
            self._rooms[name] = room
        room.narrow(0, held, new.shape[0]).copy_(new)
        self._filled[name] = filled = by_head(room.narrow(0, 0, length))
        return filled


class Int8Layer(GrowingLayer):  # type: ignore[no-untyped-call]
    """Keys and values in int8 with float32 scales [B, G, P, 1], as `quantize_per_token` rounds."""

    HELD = ("keys", "values", "key_scales", "value_scales")

    def stored(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        """Slots [..., D] as they are held."""
        return rounded(key_states, value_states)

    def floats(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, P, D] in floating point."""
        keys, values, key_scales, value_scales = self.held
        return (
            torch.ops.fxopt.dequantize(keys, key_scales, self.dtype),
            torch.ops.fxopt.dequantize(values, value_scales, self.dtype),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` slots."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            length = self.get_seq_length()
            for name, one in zip(self.HELD, self.held, strict=True):
                setattr(self, name, one[:, :, :length])


def rounded(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [..., D] in int8, then their scales [..., 1]."""
    key, key_scale = torch.ops.fxopt.quantize_per_token(keys)
    value, value_scale = torch.ops.fxopt.quantize_per_token(values)
    return key, value, key_scale, value_scale


def _begins(room: Tensor | None, filled: Tensor) -> bool:
    """Whether `filled` is the first slots of `room`."""
    return (
        room is not None
        and filled.data_ptr() == room.data_ptr()
        and filled.stride() == room.stride()
        and filled.shape[1:] == room.shape[1:]
    )


class PrefixCache(Cache):
    """The cache of an optimised model; transformers crops, reorders and repeats it as its own.

    With `int8` it keeps keys and values in int8.
    """

    def __init__(self, int8: bool = False) -> None:
        self.layer_class = Int8Layer if int8 else GrowingLayer
        super().__init__(layer_class_to_replicate=self.layer_class)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values of new slots, [S, B, G, D], behind those of a layer."""
        while len(self.layers) <= layer:
            self.layers.append(self.layer_class())  # type: ignore[no-untyped-call]
        held: Any = self.layers[layer]
        held.append(keys, values)


def prefix_of(cache: Cache, layers: int, int8: bool) -> tuple[tuple[Tensor, ...], ...]:
    """Keys and values [P, B, G, D] of the filled prefix of every layer, then, in `int8`, scales.

    They are views of what a `PrefixCache` of this kind holds, and copies of what others do.
    """
    length = int(cache.get_seq_length())
    held: list[Any] = cache.layers[:layers]
    slots = [tuple(_filled(heads, length) for heads in _held_as(one, int8)) for one in held]
    return tuple(zip(*slots, strict=True))


def _held_as(layer: Any, int8: bool) -> tuple[Tensor, ...]:
    """What a layer holds [B, G, P, ...], rounded or expanded where it is of the other kind."""
    if isinstance(layer, Int8Layer) == int8:
        return layer.held if int8 else (layer.keys, layer.values)
    return rounded(layer.keys, layer.values) if int8 else layer.floats()


def _filled(heads: Tensor, length: int) -> Tensor:
    if heads.shape[2] < length:
        raise InputError(
            f"past_key_values keeps the last {heads.shape[2]} of {length} slots of a layer, and a "
            "step reads all of them. Leave past_key_values out, or give a DynamicCache() made "
            "without a config"
        )
    slots = by_slot(heads)
    return (slots if slots.shape[0] == length else slots[:length]).contiguous()


def append(cache: Cache, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put keys and values of new slots, [S, B, G, D] a layer, behind those that `cache` holds."""
    with torch.no_grad():
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            if isinstance(cache, PrefixCache):
                cache.append(layer, key, value)
            else:
                cache.update(by_head(key), by_head(value), layer)
