"""Where further programs of a module come from: the original model, while it is what it was.

A further program holds weights of the original, and so may be made only while these are those that
the first program was made of. That is found by a checksum of every tensor's bits, which sees also
what is written past autograd's version counters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fxopt.program import Program
from fxopt.recipe import materialize

Made = TypeVar("Made")

MOST_PROGRAMS = 8
"""How many programs one module holds at most, unless the user says another number."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Source(Generic[Made]):
    """How a further program is made: `build` runs the whole pipeline on the original model.

    `model` gives the original, None when it is gone; `most` is how many programs there may be in
    all; `originals` and `made` are checksums of the original's tensors and of those that passes
    made, under their names; `untouched` names the tensors that the first program shares.
    """

    model: Callable[[], nn.Module | None]
    build: Callable[[nn.Module, Mapping[str, Any]], Made]
    most: int
    originals: Mapping[str, int]
    made: Mapping[str, int]
    untouched: frozenset[str]

    @staticmethod
    def of(
        model: nn.Module,
        program: Program,
        build: Callable[[nn.Module, Mapping[str, Any]], Made],
        most: int = MOST_PROGRAMS,
    ) -> Source[Made]:
        """The source of programs beside `program`, which was just made of `model`.

        It keeps the model alive where other calls may need it: where Python code took a branch by
        sizes, one was 1, or a constant was given. Else it knows it as long as somebody holds it.
        """
        own = dict(_tensors_of(model))
        untouched = frozenset(name for name, t in program.state.items() if own.get(name) is t)
        made = {
            name: _checksum(materialize(tensor))
            for name, tensor in program.state.items()
            if name not in untouched
        }
        originals = {
            name: _checksum(tensor) for name, tensor in own.items() if name not in program.written
        }
        if _has_branches(program):
            return Source(lambda: model, build, most, originals, made, untouched)
        return Source(weakref.ref(model), build, most, originals, made, untouched)

    def obstacle(self, present: Mapping[str, Tensor]) -> str | None:
        """Why no further program may be made beside one that holds the tensors `present`; or None.

        Weights that training has changed are no obstacle where every one of them is the original's.
        """
        model = self.model()
        if model is None:
            return "the original model is gone: keep it for as long as new sizes may come"
        own = dict(_tensors_of(model))
        changed = "weights of {} were changed since: transform the changed model again"
        if any(_checksum(present[name]) != known for name, known in self.made.items()):
            return changed.format("this module")
        for name in self.untouched & self.originals.keys():
            if name not in own or not _same(present[name], own[name]):
                return changed.format("this module")
        if self.made and any(
            name not in own or _checksum(own[name]) != known
            for name, known in self.originals.items()
        ):
            return changed.format("the original model")
        return None


def _has_branches(program: Program) -> bool:
    """Whether Python code chose by sizes or by constants that other calls may well have."""
    signature = program.signature
    return (
        any(guard.origin != "operator" for guard in signature.guards)
        or any(1 in tensor.sizes for tensor in signature.tensors)
        or not signature.added.issuperset(signature.constants)
    )


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or _checksum(one) == _checksum(other)


def _checksum(tensor: Tensor) -> int:
    """The sum of the tensor's bits, taken as integers."""
    with torch.no_grad():
        plain = tensor.detach()
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        kind = _BITS.get(plain.itemsize)
        if kind is None or plain.is_quantized or plain.layout is not torch.strided:
            return hash((tensor.data_ptr(), tensor._version))
        return int(plain.view(kind).sum(dtype=torch.int64))
