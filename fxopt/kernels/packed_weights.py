"""Weights laid out for a library, remembered beside the plain weight that everybody else sees.

A graph holds the ordinary weight; the kernel keeps the packed copy. A copy is found by who packs it
and where the weight lies (its storage, offset, sizes and strides), so that an alias made by
`detach`, by torch.export or by a compiled graph finds the copy of its original, and it dies with
that storage.
Before a copy is used, the weight must show the version that was packed (autograd counts every
in-place write) and the same values at 64 places, which catches writes through `.data`, that
autograd does not count, unless they spare all of these places.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAMPLES_A_SIDE = 8


@dataclass(frozen=True)
class _Entry:
    version: int
    sample: Tensor
    packed: Tensor


@dataclass(frozen=True)
class _Recent:
    """How a tensor object was last served, to do it again in 4 microseconds instead of 12.

    `address` is where its data was, and `view` shows what is at the sampled places now.
    """

    weight: weakref.ref[Tensor]
    pack: Callable[[Tensor], Tensor]
    address: int
    view: Tensor
    entry: _Entry


class PackedWeights:
    """The packed copies that are alive; safe to use from several threads."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._recent: dict[int, _Recent] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that all copies take together."""
        return sum(_nbytes(entry.packed) for entry in list(self._entries.values()))

    def clear(self) -> None:
        """Drop every copy; each is made again when its weight is next multiplied with."""
        with self._lock:
            self._entries.clear()
            self._recent.clear()

    def get(self, weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """The copy of `weight` (a matrix `[N, K]`), made by `pack(weight)` if none is up to date.

        `weight` must not be an inference tensor: those do not count their writes.
        """
        recent = self._recent.get(id(weight))
        if recent is not None and recent.weight() is weight and recent.pack is pack:
            entry = recent.entry
            same_place = recent.address == weight.data_ptr()
            if same_place and _is_current(entry, weight, recent.view):
                return entry.packed
        entry = self._find(weight, pack)
        self._remember(weight, pack, entry)
        return entry.packed

    def _remember(self, weight: Tensor, pack: Callable[[Tensor], Tensor], entry: _Entry) -> None:
        place = id(weight)
        alive = weakref.ref(weight, lambda _: self._recent.pop(place, None))
        view = _sample(weight)
        self._recent[place] = _Recent(alive, pack, weight.data_ptr(), view, entry)

    def _find(self, weight: Tensor, pack: Callable[[Tensor], Tensor]) -> _Entry:
        key = (pack, *_key(weight))
        entry = self._entries.get(key)
        view = _sample(weight)
        if entry is not None and _is_current(entry, weight, view):
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not _is_current(entry, weight, view):
                # The version is read first: a write during packing makes the copy look old.
                version, sample = weight._version, view.clone()
                known = entry is not None
                entry = _Entry(version, sample, pack(weight.detach()))
                self._entries[key] = entry
                if not known:
                    self._drop_with(weight, key)
        return entry

    def _drop_with(self, weight: Tensor, key: tuple[Any, ...]) -> None:
        # Popping takes no lock: the collector may run this while the same thread holds it.
        finalizer = weakref.finalize(weight.untyped_storage(), self._entries.pop, key, None)
        finalizer.atexit = False


def _key(weight: Tensor) -> tuple[Any, ...]:
    storage = weight.untyped_storage()
    return (storage._cdata, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())


def _sample(weight: Tensor) -> Tensor:
    (rows, columns), (down, right) = weight.shape, weight.stride()
    i, j = max(1, rows // _SAMPLES_A_SIDE), max(1, columns // _SAMPLES_A_SIDE)
    return weight.detach().as_strided((-(-rows // i), -(-columns // j)), (down * i, right * j))


def _is_current(entry: _Entry, weight: Tensor, view: Tensor) -> bool:
    # Comparing values on a GPU would wait for it at each call.
    on_cpu = weight.device.type == "cpu"
    return entry.version == weight._version and (not on_cpu or torch.equal(entry.sample, view))


def _nbytes(packed: Tensor) -> int:
    return packed.numel() * packed.element_size()


PACKED_WEIGHTS = PackedWeights()
