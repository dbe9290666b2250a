"""Instructions as words of int64, and the memory that they need.

Kinds, functions and storages have the numbers of `fxopt/kernels/native/executor.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from fxopt.executor.arrays import Array, Buffer, contiguous

_LINE = 64
"""Bytes that each piece of memory begins at a multiple of."""


class Kind(IntEnum):
    """What an instruction is."""

    MAP = 0
    WHOLE_MAP = 1
    MEAN = 2
    LAYER_NORM = 3
    RMS_NORM = 4
    ROTATE = 5
    GATHER = 6
    WIDEN = 7
    PRODUCT = 8
    OPERATOR_CALL = 9
    ATTENTION = 10
    CLEAR = 11
    COUNT = 12


class Function(IntEnum):
    """What a map computes, entry by entry."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    DIV = 4
    NEGATIVE = 5
    RECIPROCAL = 6
    SQUARE_ROOT = 7
    RECIPROCAL_ROOT = 8
    EXPONENTIAL = 9
    TANH = 10
    SIGMOID = 11
    SILU = 12
    GELU = 13
    GELU_TANH = 14
    RELU = 15
    COSINE = 16
    SINE = 17
    MAXIMUM = 18
    MINIMUM = 19
    REAL = 20
    SILU_TIMES = 21
    GELU_TIMES = 22
    GELU_TANH_TIMES = 23


POST_OPS = ("none", "relu", "gelu", "gelu_tanh", "silu", "add")
"""The post-operations of `packed_linear` by their numbers."""


STORED = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.uint8: 4,
}
"""How a weight is stored; of uint8 two int4 in a byte."""

CONSTANT_BYTES = 8
"""Bytes from one constant to the next."""

Word = int | float | Array | Buffer | None
"""A number, or where an array begins; None for one that isn't there. A buffer is named where an
operator makes it."""


@dataclass
class Listing:
    """Instructions in their order, and the constants and outputs that they name."""

    instructions: list[tuple[Word, ...]] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)

    def add(self, kind: Kind, *words: Word) -> None:
        """Append an instruction."""
        self.instructions.append((int(kind), *words))

    def constants_encoded(self) -> Tensor:
        """The constants, each in the first bytes of an int64 [C]."""
        packed = [
            struct.pack("<q", one) if isinstance(one, int) else struct.pack("<fxxxx", one)
            for one in self.constants
        ]
        return torch.tensor([struct.unpack("<q", one)[0] for one in packed], dtype=torch.int64)

    def encoded(self, inputs: int, held: int) -> Tensor:
        """The words, int64, for calls with so many inputs and held tensors."""
        size, results = _placed(self.instructions)
        words: list[int] = [size, results, len(self.outputs)]
        for output in self.outputs:
            words += (len(output.sizes), *output.sizes, *output.strides)
        places = ("own", "code", "input", "held", "output", "result")
        counts = (1, 1, inputs, held, len(self.outputs), results)
        first = {place: sum(counts[:index]) for index, place in enumerate(places)}
        for instruction in self.instructions:
            for word in instruction:
                if word is None:
                    words += (-1, 0)
                elif isinstance(word, Array):
                    buffer = word.buffer
                    start = buffer.offset + word.offset * word.dtype.itemsize
                    words += (first[buffer.place] + buffer.index, start)
                elif isinstance(word, Buffer):
                    words += (first[word.place], word.index)
                elif isinstance(word, float):
                    words.append(struct.unpack("<q", struct.pack("<d", word))[0])
                else:
                    words.append(word)
        return torch.tensor(words, dtype=torch.int64)


def own(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Array:
    """A new contiguous array in the call's own memory."""
    strides = contiguous(sizes)
    count = 1
    for size in sizes:
        count *= size
    return Array(Buffer("own", size=count * dtype.itemsize), tuple(sizes), strides, dtype)


def _placed(instructions: Sequence[tuple[Word, ...]]) -> tuple[int, int]:
    """Give own buffers offsets and results of operators numbers, so that those in use at a time
    are apart; the bytes of the former, and how many of the latter there are at most."""
    last: dict[Buffer, int] = {}
    named = [
        [b for word in instruction if (b := _buffer(word)) is not None and b.place in _PLACED]
        for instruction in instructions
    ]
    for index, buffers in enumerate(named):
        last.update(dict.fromkeys(buffers, index))
    taken: dict[Buffer, None] = {}
    total = results = 0
    for index, buffers in enumerate(named):
        for buffer in buffers:
            if buffer in taken:
                continue
            if buffer.place == "result":
                used = {one.index for one in taken if one.place == "result"}
                buffer.index = next(i for i in range(len(used) + 1) if i not in used)
                results = max(results, buffer.index + 1)
            else:
                buffer.offset = _gap([one for one in taken if one.place == "own"], buffer.size)
                total = max(total, buffer.offset + buffer.size)
            taken[buffer] = None
        for buffer in buffers:
            if last[buffer] == index:
                taken.pop(buffer, None)
    return total, results


_PLACED = ("own", "result")


def _buffer(word: Word) -> Buffer | None:
    return word.buffer if isinstance(word, Array) else word if isinstance(word, Buffer) else None


def _gap(taken: Sequence[Buffer], size: int) -> int:
    """The first offset with room for `size` bytes between the buffers that are in use."""
    offset = 0
    for one in sorted(taken, key=lambda buffer: buffer.offset):
        if offset + size <= one.offset:
            break
        end = one.offset + one.size
        offset = max(offset, (end + _LINE - 1) // _LINE * _LINE)
    return offset
