"""The programs for other branches of a saved model, in the same files as the first one.

Their tensors stand beside those of the first under names of their own; what several programs hold
is written once, and is one tensor again when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fxopt.errors import SaveError
from fxopt.program import Program
from fxopt.saving.tensors import EXAMPLE

Decode = Callable[[Any, Mapping[str, Tensor], tuple[Tensor, ...]], Program]

_START = "further::"
EVALUATION = "evaluation::"
"""How the names of the tensors of an evaluation program start."""


def tensors_of(programs: Sequence[Program], start: str = _START) -> dict[str, Tensor]:
    """State and example of each program under names that no other has; they begin with `start`."""
    named: dict[str, Tensor] = {}
    for index, program in enumerate(programs):
        prefix = f"{start}{index}::"
        named |= {f"{prefix}{name}": program.tensor(name) for name in program.state}
        named |= {f"{prefix}{EXAMPLE}{i}": tensor for i, tensor in enumerate(program.example)}
    return named


def first_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the first program."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((_START, EVALUATION))
    }


def decode_further(
    documents: Any, tensors: Mapping[str, Tensor], decode: Decode, start: str = _START
) -> tuple[Program, ...]:
    """The further programs of which `tensors_of` named the tensors, each made by `decode`."""
    if not isinstance(documents, list):
        raise SaveError("the saved further programs are no list")
    programs = []
    for index, document in enumerate(documents):
        prefix = f"{start}{index}::"
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        count = sum(name.startswith(EXAMPLE) for name in own)
        example = tuple(own.pop(f"{EXAMPLE}{place}") for place in range(count))
        programs.append(decode(document, own, example))
    return tuple(programs)
