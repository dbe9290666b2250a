"""The cache of a generation: the filled prefix of each layer, in memory that grows by doubling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from fxopt.errors import InputError

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

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no slot, in the shapes and dtypes of what comes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._rooms: list[Tensor | None] = [None, None]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new slots [B, G, S, D]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        self.keys = keys = self._appended(0, keys, key_states)
        self.values = values = self._appended(1, values, value_states)
        return keys, values

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
            keys: Any = self.keys
            values: Any = self.values
            self.keys, self.values = (by_head(change(by_slot(one))) for one in (keys, values))

    def _appended(self, side: int, heads: Tensor, new: Tensor) -> Tensor:
        filled, room = by_slot(heads), self._rooms[side]
        length = filled.shape[0] + new.shape[2]
        if room is None or not _begins(room, filled) or room.shape[0] < length:
            rows, groups, _, size = new.shape
            room = new.new_empty(max(_LEAST, 2 * length), rows, groups, size)
            room[: filled.shape[0]] = filled
            self._rooms[side] = room
        room[filled.shape[0] : length] = by_slot(new)
        return by_head(room[:length])


def _begins(room: Tensor, filled: Tensor) -> bool:
    """Whether `filled` is the first slots of `room`."""
    return (
        filled.data_ptr() == room.data_ptr()
        and filled.stride() == room.stride()
        and filled.shape[1:] == room.shape[1:]
    )


class PrefixCache(Cache):
    """The cache of an optimised model; transformers crops, reorders and repeats it as its own."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)


def prefix_of(cache: Cache | None, layers: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values [P, B, G, D] of the filled prefix of every layer; none where it is empty.

    They are views of what a `PrefixCache` holds, and copies of what others do.
    """
    length = 0 if cache is None else int(cache.get_seq_length())
    if cache is None or not length:
        return (), ()
    held: list[Any] = cache.layers[:layers]
    keys = [_filled(one.keys, length) for one in held]
    values = [_filled(one.values, length) for one in held]
    return tuple(keys), tuple(values)


def _filled(heads: Tensor, length: int) -> Tensor:
    if heads.shape[2] < length:
        raise InputError(
            f"past_key_values keeps the last {heads.shape[2]} of {length} slots of a layer, and a "
            "step reads all of them. Leave past_key_values out, or give a DynamicCache() made "
            "without a config"
        )
    return by_slot(heads)[:length].contiguous()


def append(cache: Cache, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put keys and values of new slots, [S, B, G, D] a layer, behind those that `cache` holds."""
    with torch.no_grad():
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(by_head(key), by_head(value), layer)
