"""Trials written to TensorBoard and Weights & Biases as they end."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from fxopt.errors import SearchError
from fxopt.search.found import TrialRecord


class TrialLog:
    """Events in `log_dir` and a run of the project `wandb`; None for neither.

    Each trial is a step: `ratio/*`, `value/*`, `metric`, and its list of passes with what became of
    it as text. Raises `SearchError` where a package that this takes isn't installed.
    """

    def __init__(self, log_dir: str | Path | None, wandb: str | None, name: str) -> None:
        self.writer: Any = None
        self.run: Any = None
        if log_dir is not None:
            _check("tensorboard", "log_dir= writes TensorBoard events")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(log_dir))
        if wandb is not None:
            _check("wandb", "wandb= logs to Weights & Biases")
            self.run = importlib.import_module("wandb").init(project=wandb, name=name)

    def write(self, trial: TrialRecord) -> None:
        """One trial that has ended."""
        scalars = {f"ratio/{name}": value for name, value in trial.ratios.items()}
        scalars |= {f"value/{name}": value for name, value in trial.values.items()}
        if trial.metric is not None:
            scalars["metric"] = trial.metric
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, trial.number)
            self.writer.add_text("trial", str(trial), trial.number)
            self.writer.flush()
        if self.run is not None:
            said = {"passes": trial.passes, "state": trial.state, "reason": trial.reason}
            self.run.log({"trial": trial.number, **scalars, **said})

    def close(self) -> None:
        """Write no more."""
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def _check(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        option = what.partition("=")[0]
        raise SearchError(
            f"{what}, and {package} isn't installed: pip install {package}, or leave {option} out"
        )
