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


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, G, P, D] as the filled part of memory with room for more slots.

    What is appended is written behind them; only where the room is used up are they copied, to
    twice of it. Cropping and reordering, inherited, leave other tensors behind: where these are no
    longer the beginning of the memory, the next append takes memory of its own.
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
        """Append new slots; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        self.keys = keys = self._appended(0, keys, key_states)
        self.values = values = self._appended(1, values, value_states)
        return keys, values

    def _appended(self, side: int, filled: Tensor, new: Tensor) -> Tensor:
        room, length = self._rooms[side], filled.shape[2] + new.shape[2]
        if room is None or not _begins(room, filled) or room.shape[2] < length:
            batch, heads, _, size = new.shape
            room = new.new_empty(batch, heads, max(_LEAST, 2 * length), size)
            room[:, :, : filled.shape[2]] = filled
            self._rooms[side] = room
        whole = room[:, :, :length]
        whole[:, :, filled.shape[2] :] = new
        return whole


def _begins(room: Tensor, filled: Tensor) -> bool:
    """Whether `filled` is the first slots of `room`."""
    return (
        filled.data_ptr() == room.data_ptr()
        and filled.stride() == room.stride()
        and filled.shape[:2] == room.shape[:2]
    )


class PrefixCache(Cache):
    """The cache of an optimised model; transformers crops, reorders and repeats it as its own."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)


def prefix_of(cache: Cache | None, layers: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of the filled prefix of every layer, as views; nothing where it is empty."""
    length = 0 if cache is None else int(cache.get_seq_length())
    if cache is None or not length:
        return (), ()
    held: list[Any] = cache.layers[:layers]
    keys, values = (
        [_filled(one.keys, length) for one in held],
        [_filled(one.values, length) for one in held],
    )
    return tuple(keys), tuple(values)


def _filled(tensor: Tensor, length: int) -> Tensor:
    if tensor.shape[2] < length:
        raise InputError(
            f"past_key_values keeps the last {tensor.shape[2]} of {length} slots of a layer, and a "
            "step reads all of them. Leave past_key_values out, or give a DynamicCache() made "
            "without a config"
        )
    return tensor[:, :, :length]


def append(cache: Cache, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put keys and values of new slots, [B, G, S, D] a layer, behind those that `cache` holds."""
    with torch.no_grad():
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, layer)
