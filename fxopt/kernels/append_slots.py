"""New slots behind those that a cache holds, for all tensors of it in one call.

    append_slots(heads, rooms, fresh)     room[P : P + S] = fresh for each, in place

for heads [B, G, P, ...], the filled beginning of a room [R, B, G, ...] contiguous, and fresh
[S, B, G, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.native import on_cpu

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = "append_slots(Tensor[] heads, Tensor(a!)[] rooms, Tensor[] fresh) -> Tensor[]"
_library.define(_SCHEMA)


def append_slots(
    heads: Sequence[Tensor], rooms: Sequence[Tensor], fresh: Sequence[Tensor]
) -> list[Tensor]:
    """The filled parts of the rooms as heads [B, G, P + S, ...], then all of them slot by slot,
    [P + S, B, G, ...].

    None, and nothing is written, where one of `heads` isn't the beginning of its room or has no
    space behind it.
    """
    triples = list(zip(heads, rooms, fresh, strict=True))
    if not all(_goes_behind(*triple) for triple in triples):
        return []
    slots = []
    for one, room, new in triples:
        length = one.shape[2] + new.shape[0]
        room[one.shape[2] : length] = new
        slots.append(room[:length])
    return [*(one.permute(1, 2, 0, 3) for one in slots), *slots]


def begins(room: Tensor, slots: Tensor) -> bool:
    """Whether `slots` [P, B, G, ...] are the first ones of `room`."""
    return (
        slots.data_ptr() == room.data_ptr()
        and slots.stride() == room.stride()
        and slots.shape[1:] == room.shape[1:]
    )


def _goes_behind(heads: Tensor, room: Tensor, fresh: Tensor) -> bool:
    slots = heads.permute(2, 0, 1, 3)
    return (
        begins(room, slots)
        and fresh.shape[1:] == room.shape[1:]
        and heads.dtype == room.dtype == fresh.dtype
        and room.is_contiguous()
        and fresh.is_contiguous()
        and slots.shape[0] + fresh.shape[0] <= room.shape[0]
    )


_library.impl("append_slots", append_slots, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, append_slots, "decoding")
