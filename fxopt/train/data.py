"""The batches of each epoch, in an order that a resumed run can repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fxopt.calls import check_batches, check_inputs
from fxopt.errors import TrainError
from fxopt.train.distributed import World
from fxopt.train.labels import check_labels


@dataclass(frozen=True)
class Batches:
    """An iterable of batches; `length` None where it doesn't tell, `classes` where labels can be
    anything."""

    source: Iterable[Any]
    length: int | None
    generators: tuple[torch.Generator, ...]
    classes: int | None = None

    def epoch(self, index: int) -> Iterator[Any]:
        """The batches of one epoch, from the first. Raises `InputError` at labels without a
        class."""
        for sampler in _samplers(self.source):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(index)
        for index, batch in enumerate(self.source):
            check_inputs(batch, "a batch of data=", TrainError)
            if self.classes is not None:
                check_labels(batch, index, self.classes)
            yield batch

    def with_classes(self, classes: int | None) -> Batches:
        """These batches, whose labels must be of that many classes: checked now where they are a
        list or a tuple, otherwise as they come, since they are read once an epoch."""
        batches = replace(self, classes=classes)
        if isinstance(self.source, (list, tuple)):
            for _ in batches.epoch(0):
                pass
        return batches


def make_batches(data: Any, batch_size: int | None, seed: int, world: World) -> Batches:
    """Batches of a Dataset (`batch_size` rows each, shuffled), a DataLoader or another iterable.

    With several processes a DataLoader is made anew with a `DistributedSampler`, unless it has one.
    Raises `TrainError` for what can't be iterated again, and for what can't be shared out.
    """
    if isinstance(data, Dataset) and not isinstance(data, (IterableDataset, DataLoader)):
        if batch_size is None:
            raise TrainError("data= is a Dataset: give batch_size= as well, or a DataLoader")
        order = torch.Generator().manual_seed(seed)
        data = DataLoader(data, batch_size, shuffle=True, generator=order)
    elif batch_size is not None:
        raise TrainError(
            f"batch_size= is for a Dataset; data= is a {type(data).__name__}, which makes the "
            "batches itself"
        )
    _check_is_iterable(data)
    source = _shared_out(data, seed, world) if world.size > 1 else data
    return Batches(source, _length(source), _generators(source))


def _check_is_iterable(data: Any) -> None:
    kinds = "a list, a DataLoader, or a Dataset with batch_size="
    check_batches(data, "data=", TrainError, kinds)
    if isinstance(data, Iterator):  # iter() of a DataLoader would start its workers
        raise TrainError(
            "data= is a generator or iterator, which gives its batches once: no epoch could be "
            "repeated and no run resumed. Give a list, a DataLoader or an IterableDataset"
        )


def _shared_out(data: Any, seed: int, world: World) -> Iterable[Any]:
    samplers = _samplers(data)
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        return data  # type: ignore[no-any-return]
    known = (
        isinstance(data, DataLoader)
        and data.batch_size is not None
        and isinstance(data.sampler, (RandomSampler, SequentialSampler))
    )
    if not known:
        raise TrainError(
            f"{world.size} processes train, and data= (a {type(data).__name__}) can't be shared "
            "out among them. Give a Dataset with batch_size=, a plain DataLoader over one, or a "
            "DataLoader with a DistributedSampler"
        )
    shuffle = isinstance(data.sampler, RandomSampler)
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.dataset, world.size, world.rank, shuffle, seed, drop_last=data.drop_last
    )
    return DataLoader(
        data.dataset,
        data.batch_size,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        drop_last=data.drop_last,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=data.generator,
        prefetch_factor=data.prefetch_factor,
        persistent_workers=data.persistent_workers,
    )


def _samplers(source: Any) -> list[Any]:
    batch_sampler = getattr(source, "batch_sampler", None)
    found = [getattr(source, "sampler", None), batch_sampler]
    found.append(getattr(batch_sampler, "sampler", None))
    once = {id(sampler): sampler for sampler in found if sampler is not None}
    return list(once.values())


def _generators(source: Any) -> tuple[torch.Generator, ...]:
    owners = [source, *_samplers(source)]
    found = [getattr(owner, "generator", None) for owner in owners]
    once = {id(one): one for one in found if isinstance(one, torch.Generator)}
    return tuple(once.values())


def _length(source: Any) -> int | None:
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:
        return None
