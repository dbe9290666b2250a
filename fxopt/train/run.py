"""The loop: groups of batches become steps, steps epochs, and both come to be on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxopt.errors import TrainError
from fxopt.train.calling import evaluating, moved
from fxopt.train.checkpoint import read_checkpoint, write_checkpoint
from fxopt.train.data import Batches
from fxopt.train.distillation_step import DistillationStep
from fxopt.train.distributed import World, without_averaging
from fxopt.train.events import Events
from fxopt.train.history import Evaluation, History, checked_evaluation, not_finite
from fxopt.train.interrupts import deferred_interrupts
from fxopt.train.rng_state import RngState, rng_state, rng_state_kept, set_rng_state
from fxopt.train.settings import Settings


@dataclass
class Position:
    """Epochs done, batches of the present one done, optimizer steps done in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class Run:
    """One run: `train()` goes from where it stands to its end."""

    def __init__(
        self,
        step_module: DistillationStep,
        batches: Batches,
        optimizer: Optimizer,
        schedule: LRScheduler,
        settings: Settings,
        world: World,
        device: torch.device,
        has_unused: bool,
    ) -> None:
        self.step_module, self.batches, self.settings = step_module, batches, settings
        self.optimizer, self.schedule = optimizer, schedule
        self.scaler = step_module.precision.scaler()
        self.world, self.device = world, device
        self.module: nn.Module = world.wrapped(step_module, has_unused)
        self.history = History()
        self.position = Position()
        self.epoch_draws: RngState | None = None
        self.now = rng_state(batches.generators)  # where the generators stood at `position`
        self.pending: list[tuple[float, dict[str, Tensor]]] = []
        self.torn = False  # between fetching the batches of a step and the end of that step
        self.stopping = False  # every process knows that it stops here

    def train(self) -> None:
        """Train to the end. An interrupt between two steps is kept in the checkpoint and raised."""
        settings = self.settings
        folder = settings.log_dir if self.world.writes else None
        self.events = Events(folder, self.position.step)
        with deferred_interrupts() as self.interrupts:
            try:
                while not self._is_finished():
                    self._epoch()
            except KeyboardInterrupt:
                if settings.checkpoint and not self.torn and self._stands_alone():
                    self.save()
                raise
            finally:
                self.events.close()

    def save(self) -> None:
        """Write the checkpoint; every process must come here at the same step."""
        self._flush()
        own = {"epoch": self.epoch_draws, "now": self.now}
        all_draws = self.world.gathered(own)
        if not self.world.writes or self.settings.checkpoint is None:
            return
        state = {
            "settings": self.described(),
            "student": self.step_module.student.state_dict(),
            "projections": self.step_module.objective.projections.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": asdict(self.position),
            "draws": all_draws,
            "history": self.history.to_plain(),
        }
        write_checkpoint(self.settings.checkpoint, state)
        self._tell(f"step {self.position.step}: saved {self.settings.checkpoint}")

    def load(self) -> None:
        """Go to where the checkpoint stands."""
        assert self.settings.checkpoint is not None
        state = read_checkpoint(self.settings.checkpoint, self.described())
        try:
            self.step_module.student.load_state_dict(state["student"])
            self.step_module.objective.projections.load_state_dict(state["projections"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainError(
                f"{self.settings.checkpoint} was written for another student or optimizer: {error}"
            ) from error
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.history = History.from_plain(state["history"])
        own = state["draws"][self.world.rank]
        self.epoch_draws, self.now = own["epoch"], own["now"]
        if not self.position.batch:
            set_rng_state(self.now, self.batches.generators)
        self._tell(f"step {self.position.step}: resumed from {self.settings.checkpoint}")

    def described(self) -> dict[str, Any]:
        """What must be the same for a resumed run to end at the same weights."""
        settings, precision = self.settings, self.step_module.precision
        return {
            "terms": str(self.step_module.objective.terms),
            "epochs": settings.epochs,
            "steps": settings.steps,
            "batches": self.batches.length,
            "accumulate": settings.accumulate,
            "clip": settings.clip,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "optimizer": type(self.optimizer).__name__,
            "schedule": type(self.schedule).__name__,
            "autocast": str(precision.autocast),
            "scaled": precision.scaled,
            "seed": settings.seed,
            "processes": self.world.size,
        }

    def _is_finished(self) -> bool:
        if self.settings.epochs is not None:
            return self.position.epoch >= self.settings.epochs
        return self._has_all_steps() and not self.position.batch

    def _has_all_steps(self) -> bool:
        return self.settings.steps is not None and self.position.step >= self.settings.steps

    def _epoch(self) -> None:
        at = self.position
        self.step_module.student.train()
        batches = self._resumed() if at.batch else self._from_first()
        while not self._has_all_steps():
            self.torn = True
            group = list(islice(batches, self.settings.accumulate))
            if not group:
                break
            self._step(group)
            at.batch += len(group)
            at.step += 1
            self.now = rng_state(self.batches.generators)
            self.torn = False
            self._after_step()
        self.torn = False
        if not at.batch:
            raise TrainError(f"data= gave no batch in epoch {at.epoch + 1}")
        self._flush()
        self._evaluate()
        at.epoch, at.batch, self.epoch_draws = at.epoch + 1, 0, None
        self.now = rng_state(self.batches.generators)
        if self.settings.checkpoint:
            self.save()
        self._stop_if_asked(agree=True)

    def _from_first(self) -> Iterator[Any]:
        self.epoch_draws = rng_state(self.batches.generators)
        return self.batches.epoch(self.position.epoch)

    def _resumed(self) -> Iterator[Any]:
        """The rest of the epoch: its order is drawn again, the batches done are left out."""
        assert self.epoch_draws is not None
        set_rng_state(self.epoch_draws, self.batches.generators)
        batches = self.batches.epoch(self.position.epoch)
        for _ in islice(batches, self.position.batch):
            pass
        set_rng_state(self.now, self.batches.generators)
        return batches

    def _step(self, group: list[Any]) -> None:
        step_module, optimizer, scaler = self.step_module, self.optimizer, self.scaler
        self.module.zero_grad()
        sums: dict[str, Tensor] = {}
        for index, given in enumerate(group):
            batch = moved(given, self.device)
            taught = step_module.teach(batch)
            is_last = index == len(group) - 1
            with nullcontext() if is_last else without_averaging(self.module):
                values = self.module(batch, taught)
                total = step_module.objective.total(values)
                scaler.scale(total / len(group)).backward()
            for name, value in {"total": total, **values}.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(group)
        if self.settings.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(step_module.trained(), self.settings.clip)
        self.pending.append((optimizer.param_groups[0]["lr"], sums))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        self.module.zero_grad()
        if scaler.get_scale() < scale:
            self.history.skipped += 1
        else:
            self.schedule.step()

    def _after_step(self) -> None:
        step, settings = self.position.step, self.settings
        logs = step % settings.log_every == 0
        if logs:
            self._flush()
            whole = f" of {settings.steps}" if settings.steps else ""
            where = f"step {step}{whole}, epoch {self.position.epoch + 1}"
            self._tell(f"{where}: {self.history.line()}")
        if settings.save_every and step % settings.save_every == 0:
            self.save()
        self._stop_if_asked(agree=logs)

    def _flush(self) -> None:
        """Move the losses from the device into the history. Raises `TrainError` for a NaN."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        names = list(pending[0][1])
        rows = torch.stack([torch.stack(list(values.values())) for _, values in pending])
        first = self.position.step - len(pending) + 1
        for offset, row in enumerate(self.world.averaged(rows).tolist()):
            values, rate = dict(zip(names, row, strict=True)), pending[offset][0]
            self._check_finite(values, first + offset)
            for name, value in values.items():
                self.history.losses.setdefault(name, []).append(value)
            self.history.learning_rates.append(rate)
            self.events.write("loss", values, first + offset)
            self.events.write("train", {"learning_rate": rate}, first + offset)
        self.events.flush()

    def _check_finite(self, values: dict[str, float], step: int) -> None:
        wrong = not_finite(values)
        if wrong and not self.scaler.is_enabled():
            raise TrainError(
                f"step {step}: {', '.join(wrong)} aren't finite. The checkpoint, if there is one, "
                "is from before. Lower the learning rate, clip gradients, or train in full "
                "precision"
            )

    def _evaluate(self) -> None:
        if self.settings.evaluate is None:
            return
        student, position = self.step_module.student, self.position
        with evaluating(student), rng_state_kept(self.batches.generators):
            values = checked_evaluation(self.settings.evaluate(student))
        found = Evaluation(position.epoch + 1, position.step, values)
        self.history.evaluations.append(found)
        self.events.write("evaluation", values, position.step)
        self._tell(str(found))

    def _stop_if_asked(self, agree: bool) -> None:
        """Raise the interrupt that came; several processes agree at the steps that are logged."""
        asked = self.interrupts.requested
        if self.world.size > 1:
            asked = agree and self.world.any(asked, self.device)
        if asked:
            self.stopping = True
            raise KeyboardInterrupt

    def _stands_alone(self) -> bool:
        return self.world.size == 1 or self.stopping

    def _tell(self, line: str) -> None:
        if self.settings.progress is not None and self.world.writes:
            self.settings.progress(line)
