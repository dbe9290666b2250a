"""The options of a run, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fxopt.errors import TrainError
from fxopt.progress import Progress
from fxopt.train.events import check_can_write_events
from fxopt.train.precision import PrecisionName

Evaluate: TypeAlias = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Settings:
    """What `distill` was asked for, but for the models, the data and the optimizer."""

    epochs: int | None
    steps: int | None
    learning_rate: float
    weight_decay: float
    clip: float | None
    accumulate: int
    precision: PrecisionName
    seed: int
    evaluate: Evaluate | None
    checkpoint: Path | None
    save_every: int | None
    resume: bool
    log_dir: Path | None
    log_every: int
    progress: Progress | None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise TrainError("give epochs= or steps=, one of them")
        for name in ("epochs", "steps", "accumulate", "save_every", "log_every"):
            self._check_count(name)
        for name in ("learning_rate", "clip"):
            self._check_number(name, above_zero=True)
        self._check_number("weight_decay", above_zero=False)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise TrainError(f"seed={self.seed!r}: must be an integer, 0 or above")
        if self.precision not in ("full", "mixed", "auto"):
            raise TrainError(f"precision={self.precision!r}: must be 'full', 'mixed' or 'auto'")
        for name in ("evaluate", "progress"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TrainError(f"{name}={getattr(self, name)!r:.60}: must be callable")
        self._check_checkpoint()
        if self.log_dir is not None:
            check_can_write_events()

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (type(value) is not int or value < 1):
            raise TrainError(f"{name}={value!r}: must be an integer, 1 or above")

    def _check_number(self, name: str, above_zero: bool) -> None:
        value: Any = getattr(self, name)
        if value is None:
            return
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0 or (above_zero and not value):
            bound = "above 0" if above_zero else "0 or above"
            raise TrainError(f"{name}={value!r}: must be a number {bound}")

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            if self.save_every is not None or self.resume:
                raise TrainError("save_every= and resume= need checkpoint=, the path of the file")
            return
        if self.checkpoint.is_dir() or not self.checkpoint.parent.is_dir():
            raise TrainError(
                f"checkpoint={str(self.checkpoint)!r} must be a file in a folder that exists"
            )
        if self.checkpoint.exists() and not self.resume:
            raise TrainError(
                f"checkpoint={str(self.checkpoint)!r} exists: give resume=True to go on from it, "
                "or remove it to start anew"
            )
