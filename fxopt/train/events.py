"""TensorBoard events, where the package is there and they were asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import TrainError


class Events:
    """Scalars written to `folder`; nothing for None. What a resumed run repeats is replaced."""

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self.writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge = first_step + 1 if first_step else None
            self.writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Each value as `group/name` at `step`."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        """Put on disk what was written, so that a crash keeps it."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write no more."""
        if self.writer is not None:
            self.writer.close()


def check_can_write_events() -> None:
    """Raise `TrainError` where TensorBoard isn't installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainError(
            "log_dir= writes TensorBoard events, and tensorboard isn't installed: "
            "pip install tensorboard, or leave log_dir out"
        )
