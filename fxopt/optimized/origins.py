"""The tensors of the original that weights were derived from, and whether they are still the same.

A pass that quantizes, cuts, fuses or packs a weight makes a copy of what it was then; tensors that
no pass touched are the original's own. After `model.load_state_dict(...)` or an optimizer's step on
the original, the copies would be old and the rest new: a model that nobody has trained.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import ModelError

_version = operator.attrgetter("_version")


class Origins:
    """Watches tensors without keeping their memory: `check` costs a few microseconds.

    torch counts the writes to a tensor, and an empty alias of it has the same counter. What goes
    past the counter (`parameter.data`, fused optimizers, which change all parameters) is looked for
    in one tensor a call, in turn: where its memory is, and on a CPU one of its entries.
    """

    def __init__(self, tensors: Mapping[str, Tensor], inherited: Origins | None = None) -> None:
        self._earlier = inherited
        watched = {n: t for n, t in tensors.items() if not t.is_inference() and t.numel()}
        self._names = list(watched)
        self._counters = [_counter(tensor) for tensor in watched.values()]
        self._versions = [counter._version for counter in self._counters]
        self._total = sum(self._versions)
        self._probes = [_Probe(tensor) for tensor in watched.values()]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._names) + (len(self._earlier) if self._earlier else 0)

    def check(self) -> None:
        """Raise `ModelError`, which names the tensor, where one was changed since."""
        if sum(map(_version, self._counters)) != self._total:
            pairs = zip(self._counters, self._versions, strict=True)
            self._fail(
                next(i for i, (counter, old) in enumerate(pairs) if _version(counter) != old)
            )
        if self._probes:
            self._turn = (self._turn + 1) % len(self._probes)
            if not self._probes[self._turn].holds():
                self._fail(self._turn)
        if self._earlier is not None:
            self._earlier.check()

    def _fail(self, index: int) -> None:
        raise ModelError(
            f"{self._names[index]} of the original model was changed in place after this module "
            "was made. Weights that passes derived from it are still the old ones, tensors that "
            "they left alone are shared and new. Transform the model again with fxopt.transform; "
            "to change it and keep this module, transform a copy.deepcopy(model)."
        )


class _Probe:
    """One tensor as it was: its memory and an entry from its middle; no reference to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._pointer = _pointer(tensor)
        self._index = tuple(size // 2 for size in tensor.shape)
        self._entry = self._read(tensor)

    def holds(self) -> bool:
        """Whether it is the same, as far as that entry tells; true once it is gone."""
        tensor = self._tensor()
        if tensor is None:
            return True
        if _pointer(tensor) != self._pointer:
            return False
        entry = self._read(tensor)
        return bool(entry == self._entry) or entry != entry

    def _read(self, tensor: Tensor) -> Any:
        """An entry; None on a device, which would have to be waited for."""
        return tensor.detach()[self._index].item() if tensor.device.type == "cpu" else None


def _counter(tensor: Tensor) -> Tensor:
    """An alias of `tensor` by its count of writes, without its memory."""
    alias = tensor.detach()
    alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # an opaque layout
        return 0
