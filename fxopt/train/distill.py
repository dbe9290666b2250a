"""`distill`: a student learns from its teacher what a cut, or a smaller build, made it lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fxopt.errors import TrainError
from fxopt.optimized import Optimized
from fxopt.progress import Progress
from fxopt.train.calling import device_of, put_back
from fxopt.train.checkpoint import check_is_plain
from fxopt.train.data import Batches, make_batches
from fxopt.train.distillation_loss import DistillationLoss
from fxopt.train.distillation_step import DistillationStep, dry_run
from fxopt.train.distributed import world_of
from fxopt.train.history import Distilled
from fxopt.train.optimization import (
    OptimizerChoice,
    ScheduleChoice,
    forget_extra,
    make_optimizer,
    make_schedule,
)
from fxopt.train.precision import PrecisionName, choose_precision
from fxopt.train.rng_state import seeded
from fxopt.train.run import Run
from fxopt.train.settings import Evaluate, Settings
from fxopt.train.terms import Term

_LEARNING_RATE, _WEIGHT_DECAY = 5e-5, 0.01


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    terms: Sequence[Term] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: OptimizerChoice = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    schedule: ScheduleChoice = "linear",
    clip: float | None = 1.0,
    accumulate: int = 1,
    precision: PrecisionName = "full",
    device: torch.device | str | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    log_dir: str | Path | None = None,
    log_every: int = 10,
    progress: Progress | None = None,
    distributed: bool | None = None,
) -> Distilled:
    """Train `student` in place to give what `teacher` gives; returns it with what was measured.

    `student` is any nn.Module, or an `Optimized` captured with mode="train"; the teacher any module
    that shares no parameter with it. Both are called with each batch of `data`: a dict as keywords,
    a tuple or list as positionals, a tensor as it is. `terms` say what is compared, `Task`,
    `Logits`, `Hidden` and `Attention`; left out, what the outputs allow (see `DistillationLoss`).

    It runs for `epochs` (1) passes over the data or for `steps` optimizer steps, each over
    `accumulate` batches that count the same whatever their size, and on the device of the student,
    or on `device`, to which both models are moved. `optimizer` is an instance, or a callable that
    makes one of parameter groups; left out, AdamW with `learning_rate` (5e-5) and `weight_decay`
    (0.01, on matrices only). `schedule` is "linear" (up over the first tenth of the steps, down to
    0), "constant", an LRScheduler of that optimizer or a callable (optimizer, steps) that makes
    one; it steps after each optimizer step. `clip` is the largest norm of the gradients.

    `precision="mixed"` puts torch.autocast around plain models, "auto" where the device is fast at
    it; a captured student computes as its passes say. The loss is scaled where float16 is used.

    All random numbers follow from `seed`; the caller's generators are put back. `checkpoint` is a
    file written after every epoch and every `save_every` steps. A run stopped at any moment goes on
    from it with `resume=True`, to the same weights, bit for bit where the device's operators are
    deterministic; the batches done are read once more, not computed. Ctrl-C waits for the end of
    the step, writes the checkpoint and is raised.

    `evaluate(student)` returns a dict of numbers after each epoch. `log_dir` gets TensorBoard
    events; `progress` a line every `log_every` steps. Where torch.distributed is initialised
    (torchrun), all processes train together unless `distributed=False`: data are shared out,
    gradients averaged; rank 0 writes, each reads the checkpoint and calls `evaluate`.

    Raises `TrainError` for wrong options, data, models and checkpoints, before anything is trained,
    and for a loss that isn't finite; `ModelError` for a student captured in eval mode.
    """
    own_optimizer = optimizer is not None
    _check_rates(own_optimizer, learning_rate, weight_decay)
    settings = Settings(
        epochs=1 if epochs is None and steps is None else epochs,
        steps=steps,
        learning_rate=_LEARNING_RATE if learning_rate is None else learning_rate,
        weight_decay=_WEIGHT_DECAY if weight_decay is None else weight_decay,
        clip=clip,
        accumulate=accumulate,
        precision=precision,
        seed=seed,
        evaluate=evaluate,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        save_every=save_every,
        resume=resume,
        log_dir=None if log_dir is None else Path(log_dir),
        log_every=log_every,
        progress=progress,
    )
    objective = DistillationLoss(teacher, terms)
    _check_models(student, teacher)
    where = _placed(student, teacher, device, isinstance(optimizer, torch.optim.Optimizer))
    world = world_of(distributed)
    batches = make_batches(data, batch_size, seed, world)
    step_module = DistillationStep(student, objective, choose_precision(precision, student, where))
    with _trained_alone(student), seeded(seed + world.rank), torch.enable_grad():
        batches, has_unused = dry_run(step_module, batches, where)
        extra = list(objective.projections.parameters())
        used = make_optimizer(
            optimizer, student, extra, settings.learning_rate, settings.weight_decay
        )
        try:
            rates = make_schedule(schedule, used, _total_steps(settings, batches))
            run = Run(step_module, batches, used, rates, settings, world, where, has_unused)
            return _trained(run)
        finally:
            if optimizer is used:
                forget_extra(used, extra)


def _trained(run: Run) -> Distilled:
    settings, step_module = run.settings, run.step_module
    if settings.checkpoint is not None:
        state = {"optimizer": run.optimizer.state_dict(), "schedule": run.schedule.state_dict()}
        check_is_plain(state)
        if settings.resume and settings.checkpoint.exists():
            run.load()
    started = run.position.step
    run.train()
    terms = step_module.objective.terms or ()
    return Distilled(step_module.student, run.history, terms, step_module.precision.reason, started)


def _total_steps(settings: Settings, batches: Batches) -> int | None:
    if settings.steps is not None or batches.length is None:
        return settings.steps
    assert settings.epochs is not None
    return settings.epochs * -(-batches.length // settings.accumulate)


def _check_rates(own: bool, learning_rate: float | None, weight_decay: float | None) -> None:
    if own and (learning_rate is not None or weight_decay is not None):
        raise TrainError(
            "learning_rate= and weight_decay= are those of the default optimizer; set them in "
            "optimizer=, or leave that out"
        )


def _check_models(student: nn.Module, teacher: nn.Module) -> None:
    if not isinstance(student, nn.Module):
        raise TrainError(f"the student must be an nn.Module, not {type(student).__name__}")
    if isinstance(student, Optimized) and not student.is_captured:
        raise TrainError(
            "the student has no graph yet, and so no parameters: give fxopt.transform its "
            "example_inputs, or call the student once"
        )
    modes = {module: module.training for module in student.modules()}
    student.train()  # raises for one captured in eval mode
    put_back(modes)
    trained = [(name, one) for name, one in student.named_parameters() if one.requires_grad]
    if not trained:
        raise TrainError("the student has no parameter to train: all are frozen")
    memory = {_memory(tensor) for tensor in [*teacher.parameters(), *teacher.buffers()]}
    shared = [name for name, one in trained if _memory(one) in memory]
    if shared:
        raise TrainError(
            f"student and teacher share {len(shared)} of {len(trained)} parameters to be trained, "
            f"such as {shared[0]}: the teacher would change with the student. "
            "fxopt.transform shares what no pass touches; copy.deepcopy(student) has its own"
        )


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _placed(
    student: nn.Module, teacher: nn.Module, device: torch.device | str | None, has_optimizer: bool
) -> torch.device:
    """The device of the run, after both models were moved there if it was named."""
    present = device_of(student) or torch.device("cpu")
    if device is not None:
        wanted = torch.empty(0, device=device).device
        if has_optimizer and wanted != present:
            raise TrainError(
                f"the student is on {present} and device={device!r}: move it there before the "
                "optimizer is made, or give optimizer= as a callable"
            )
        student.to(wanted)
        teacher.to(wanted)
        return wanted
    other = device_of(teacher)
    if other is not None and other != present:
        raise TrainError(
            f"the student is on {present}, the teacher on {other}: give device= to move both"
        )
    return present


@contextmanager
def _trained_alone(student: nn.Module) -> Iterator[None]:
    """Afterwards each part of the student is in the mode it had, and no gradient is left."""
    modes = {module: module.training for module in student.modules()}
    try:
        yield
    finally:
        put_back(modes)
        student.zero_grad()
