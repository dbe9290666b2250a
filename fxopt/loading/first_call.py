"""One call of a model before any work, which finds what it can't read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import InputError, ModelError
from fxopt.loading.folder import first_line
from fxopt.loading.texts import written_length


def check_call(
    source: Path, model: nn.Module, inputs: Mapping[str, torch.Tensor], length: int
) -> None:
    """Call the model with one row; find what it can read where it can't read `length` tokens."""
    ids, table = inputs.get("input_ids"), _vocabulary(model)
    if ids is not None and table is not None and int(ids.max()) >= table:
        raise ModelError(
            f"the tokenizer of {source} gives the id {int(ids.max())}, and the model has {table}: "
            "they don't belong together. Save the model's own tokenizer in the folder."
        )
    error = _call_error(model, inputs, length)
    if error is None:
        return
    readable, too_long = 0, length
    while not all(map(torch.is_floating_point, inputs.values())) and too_long - readable > 1:
        middle = (readable + too_long) // 2
        fits = _call_error(model, inputs, middle) is None
        readable, too_long = (middle, too_long) if fits else (readable, middle)
    if readable:
        raise InputError(
            f"{type(model).__name__} can't read {length} tokens a row: it takes {readable} at "
            f"most. Give --length {readable} or less."
        ) from error
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    raise ModelError(
        f"{type(model).__name__} can't be called with {shapes}: {type(error).__name__}: "
        f"{first_line(error)}. Call fxopt.transform(model, example_inputs=...) in Python."
    ) from error


def _call_error(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], length: int
) -> Exception | None:
    """What a call with the first row, cut at `length` tokens, raises."""
    row = {}
    for name, value in inputs.items():
        count = written_length(length) if name == "decoder_input_ids" else length
        row[name] = value[:1] if value.is_floating_point() else value[:1, :count]
    try:
        with torch.no_grad():
            model(**row)
    except Exception as error:  # whatever a forward may raise
        return error
    return None


def _vocabulary(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None
