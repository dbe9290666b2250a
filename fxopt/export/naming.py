"""The names people meet in the file: inputs, outputs and dynamic sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.utils._pytree as pytree

from fxopt.program import Program
from fxopt.signature import TensorInput

_KEY = re.compile(r"\['([^']*)'\]")
_SYMBOL = re.compile(r"\b[su]\d+\b")


def input_names(program: Program) -> list[str]:
    """The argument paths of the model's forward, such as `input_ids` or `images[0]`."""
    return [tensor.path for tensor in program.signature.tensors]


def result_names(program: Program) -> list[str]:
    """The fields of the model's output, such as `last_hidden_state`; no input bears one of them."""
    taken = set(input_names(program))
    names = []
    for path in _result_paths(program):
        readable = _KEY.sub(r".\1", path).lstrip(".") or "output"
        readable = f"output{readable}" if readable.startswith("[") else readable
        names.append(_free(readable, "_output", taken))
        taken.add(names[-1])
    return names


def _result_paths(program: Program) -> Iterator[str]:
    """Each output tensor's path in the model's output, such as `.logits` or `['pair'][0]`."""
    signature = program.signature
    numbers: list[Any] = list(range(signature.out_spec.num_leaves))
    outputs = pytree.tree_unflatten(numbers, signature.out_spec)
    for path, number in pytree.tree_flatten_with_path(outputs)[0]:
        if number not in signature.out_constants:
            yield "".join(map(str, path))


def axis_names(inputs: Iterable[TensorInput]) -> dict[str, str]:
    """{dynamic size: readable name}: `batch`, `length` of token ids, else `image_axis_2`.

    A size is named after the first axis that has it. Two batches that the model takes apart are
    told apart by their inputs: `batch` and `attention_mask_batch`.
    """
    names: dict[str, str] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.sizes):
            if isinstance(size, str) and size not in names:
                names[size] = _axis_name(tensor, axis, set(names.values()))
    return names


def renamed(expression: str, names: Mapping[str, str]) -> str:
    """A size expression such as `s0*s1` in readable names."""
    return _SYMBOL.sub(lambda found: names.get(found[0], found[0]), expression)


def _axis_name(tensor: TensorInput, axis: int, taken: set[str]) -> str:
    tokens = len(tensor.sizes) == 2 and not tensor.dtype.is_floating_point
    plain = "batch" if axis == 0 else "length" if tokens and axis == 1 else None
    if plain is not None and plain not in taken:
        return plain
    owner = re.sub(r"\W+", "_", tensor.path).strip("_")
    return _free(f"{owner}_{plain or f'axis_{axis}'}", "_other", taken)


def _free(name: str, suffix: str, taken: set[str]) -> str:
    while name in taken:
        name += suffix
    return name
