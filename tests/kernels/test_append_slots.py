"""New slots behind those of a cache: in place or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("decoded_by")

ops = torch.ops.fxopt


def held(room: Tensor, filled: int) -> Tensor:
    return room[:filled].permute(1, 2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_writes_behind_what_is_filled(dtype: torch.dtype) -> None:
    rooms = [torch.zeros(9, 2, 3, size, dtype=dtype) for size in (4, 1)]
    fresh = [torch.ones(2, *room.shape[1:], dtype=dtype) for room in rooms]
    made = ops.append_slots([held(room, 5) for room in rooms], rooms, fresh)
    assert [one.shape for one in made[:2]] == [(2, 3, 7, 4), (2, 3, 7, 1)]
    for room, heads, slots in zip(rooms, made[:2], made[2:], strict=True):
        assert room[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
        assert torch.equal(room[:7], slots)
        assert slots.data_ptr() == heads.data_ptr() == room.data_ptr()
        assert torch.equal(heads.permute(2, 0, 1, 3), slots)


UNFIT = ("full", "elsewhere", "not the beginning", "other rows", "other dtype", "strided")


@pytest.mark.parametrize("fault", UNFIT)
def test_where_one_has_no_room_nothing_is_written(fault: str) -> None:
    rooms = [torch.zeros(9, 2, 3, 4) for _ in range(2)]
    heads = [held(room, 5) for room in rooms]
    fresh = [torch.ones(2, 2, 3, 4) for _ in range(2)]
    if fault == "full":
        heads[1] = held(rooms[1], 8)
    elif fault == "elsewhere":
        heads[1] = heads[1].clone()
    elif fault == "not the beginning":
        heads[1] = rooms[1][1:6].permute(1, 2, 0, 3)
    elif fault == "other rows":
        fresh[1] = torch.ones(2, 1, 3, 4)
    elif fault == "other dtype":
        fresh[1] = fresh[1].double()
    else:
        fresh[1] = torch.ones(2, 2, 4, 3).mT
    assert ops.append_slots(heads, rooms, fresh) == []
    assert not any(bool(room.any()) for room in rooms)
