"""The cache of a generation: the filled prefix of each layer, in memory that grows by doubling."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxopt.calls import CACHE_NAMES
from fxopt.errors import InputError
from fxopt.kernels.append_slots import begins

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

    @classmethod
    def stored_of_all(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Slots of several layers as they are held, those of one name after those of another."""
        return [*keys, *values]

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
        self.rooms: dict[str, Tensor] = {}
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
        room, held = self.rooms.get(name), heads.shape[2]
        length = held + new.shape[0]
        if room is None or not begins(room, by_slot(heads)) or room.shape[0] < length:
            room = new.new_empty(max(_LEAST, 2 * length), *new.shape[1:])
            room[:held] = by_slot(heads)
            self.rooms[name] = room
        room.narrow(0, held, new.shape[0]).copy_(new)
        return by_head(room.narrow(0, 0, length))


class Int8Layer(GrowingLayer):  # type: ignore[no-untyped-call]
    """Keys and values in int8 with float32 scales [B, G, P, 1], as `quantize_per_token` rounds."""

    HELD = ("keys", "values", "key_scales", "value_scales")

    def stored(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        """Slots [..., D] as they are held."""
        return rounded(key_states, value_states)

    @classmethod
    def stored_of_all(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Slots of several layers as they are held, those of one name after those of another."""
        shapes = {one.shape for one in (*keys, *values)}
        if len(shapes) == 1:
            # One rounding for all of them: a call takes longer than a slot.
            made = rounded(torch.stack(tuple(keys)), torch.stack(tuple(values)))
            return [one for side in made for one in side.unbind()]
        each = [rounded(*pair) for pair in zip(keys, values, strict=True)]
        return [one for side in zip(*each, strict=True) for one in side]

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


class PrefixCache(Cache):
    """The cache of an optimised model; transformers crops, reorders and repeats it as its own.

    With `int8` it keeps keys and values in int8. All layers are written in one call as long as they
    have room; what was handed out of them last is handed out again as long as no layer was changed.
    """

    def __init__(self, int8: bool = False) -> None:
        self.layer_class = Int8Layer if int8 else GrowingLayer
        super().__init__(layer_class_to_replicate=self.layer_class)
        self._heads: list[Tensor] = []
        self._slots: list[Tensor] = []  # the same tensors slot by slot

    def append(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Put keys and values of new slots, [S, B, G, D] a layer, behind those of all layers."""
        while len(self.layers) < len(keys):
            self.layers.append(self.layer_class())  # type: ignore[no-untyped-call]
        layers: list[Any] = self.layers
        if len(layers) != len(keys) or not self._append_in_place(keys, values):
            for layer, key, value in zip(layers, keys, values, strict=False):
                layer.append(key, value)

    def slots(self) -> tuple[tuple[Tensor, ...], ...]:
        """The tensors [P, B, G, ...] of every layer, those of one name after those of another."""
        heads = self._all_heads()
        if len(heads) != len(self._heads) or any(map(operator.is_not, heads, self._heads)):
            length = int(self.get_seq_length())
            self._heads, self._slots = heads, [_filled(one, length) for one in heads]
        count = len(self.layers)
        return tuple(
            tuple(self._slots[first : first + count]) for first in range(0, len(heads), count)
        )

    def _all_heads(self) -> list[Tensor]:
        layers: list[Any] = self.layers
        return [getattr(one, name) for name in self.layer_class.HELD for one in layers]

    def _append_in_place(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Whether all layers had room, and now hold the new slots."""
        layers: list[Any] = self.layers
        if not all(layer.is_initialized and layer.rooms for layer in layers):
            return False
        names = self.layer_class.HELD
        rooms = [layer.rooms.get(name) for name in names for layer in layers]
        if any(room is None for room in rooms):
            return False
        fresh = layers[0].stored_of_all(keys, values)
        made = torch.ops.fxopt.append_slots(self._all_heads(), rooms, fresh)
        if not made:
            return False
        self._heads, self._slots = made[: len(rooms)], made[len(rooms) :]
        places = ((layer, name) for name in names for layer in layers)
        for (layer, name), heads in zip(places, self._heads, strict=True):
            setattr(layer, name, heads)
        return True


def prefix_of(cache: Cache, layers: int, int8: bool) -> tuple[tuple[Tensor, ...], ...]:
    """Keys and values [P, B, G, D] of the filled prefix of every layer, then, in `int8`, scales.

    They are views of what a `PrefixCache` of this kind holds, and copies of what others do.
    """
    held: list[Any] = cache.layers[:layers]
    same = all(isinstance(one, Int8Layer) == int8 for one in held)
    if isinstance(cache, PrefixCache) and len(cache.layers) == layers and same:
        return cache.slots()
    length = int(cache.get_seq_length())
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
        if isinstance(cache, PrefixCache):
            cache.append(keys, values)
            return
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(by_head(key), by_head(value), layer)
