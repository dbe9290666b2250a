"""The file that a run goes on from: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import TrainError

FORMAT = 1


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Put `state` in the place of what `path` held.

    At every moment `path` holds either; a process that is killed here leaves a file
    `.NAME.partial` beside it, which the next one overwrites. Raises `TrainError` for an OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainError(f"the checkpoint {path} can't be written: {error}") from error


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was written to `path` by a run of the same `settings`, on the CPU.

    Raises `TrainError` for a file that is damaged or no checkpoint, and for other settings, which
    would not go on to the same weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{path} can't be read as a checkpoint: {type(error).__name__}: {error!s:.200}. Remove "
            "it to start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainError(f"{path} is no checkpoint of fxopt.train.distill, format {FORMAT}")
    written: dict[str, Any] = state["settings"]
    different = [
        f"{name} was {written.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if written.get(name) != value
    ]
    if different:
        raise TrainError(
            f"{path} was written by another run: {'; '.join(different)}. Go on with what it was, "
            "or give another checkpoint="
        )
    return state


def check_is_plain(state: Mapping[str, Any]) -> None:
    """Raise `TrainError` where `state` would need pickle to be read again."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise TrainError(
            f"{' and '.join(state)} can't be kept in a checkpoint: {error!s:.300}. Leave "
            "checkpoint= out, or use one whose state_dict() holds tensors and numbers only"
        ) from error
