"""The processes that train together; one process is a world of one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxopt.errors import TrainError


@dataclass(frozen=True)
class World:
    """This process among `size` that hold the same student."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and events."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def averaged(self, values: Tensor) -> Tensor:
        """The mean of `values` over the ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` holds on a rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def wrapped(self, module: nn.Module, has_unused: bool) -> nn.Module:
        """`module` with its gradients averaged over the ranks, starting from those of rank 0."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=has_unused)


def world_of(distributed: bool | None) -> World:
    """All processes of torch.distributed, or with `False`, or where it isn't in use, this one.

    Raises `TrainError` for `True` without `torch.distributed.init_process_group`.
    """
    ready = dist.is_available() and dist.is_initialized()
    if distributed and not ready:
        raise TrainError(
            "distributed=True, but torch.distributed isn't initialised: start with torchrun and "
            "call torch.distributed.init_process_group('gloo' or 'nccl') first"
        )
    if distributed is False or not ready:
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def without_averaging(module: nn.Module) -> AbstractContextManager[object]:
    """The backward of a batch that isn't the last of its step: gradients only accumulate."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
