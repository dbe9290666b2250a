"""One call of the student with what the teacher said about it: what every step computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import TrainError
from fxopt.train.calling import call, moved
from fxopt.train.data import Batches
from fxopt.train.distillation_loss import DistillationLoss
from fxopt.train.history import not_finite
from fxopt.train.labels import class_count
from fxopt.train.precision import Precision
from fxopt.train.rng_state import rng_state_kept


class DistillationStep(nn.Module):
    """Batch and teacher's outputs -> the terms; a module, so that DDP sees all that is trained."""

    def __init__(
        self, student: nn.Module, objective: DistillationLoss, precision: Precision
    ) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.precision = precision

    def forward(self, batch: Any, taught: Any) -> dict[str, Tensor]:
        return self.objective.losses(self.outputs(batch), batch, taught)

    def outputs(self, batch: Any) -> Any:
        """What the student returns, in the run's precision."""
        with self.precision.around(self.student):
            return call(self.student, batch)

    def teach(self, batch: Any) -> Any:
        """What the teacher returns, in the run's precision."""
        with self.precision.around(self.objective.teacher):
            return self.objective.teach(batch)

    def trained(self) -> list[nn.Parameter]:
        """Parameters of student and projections that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def dry_run(
    step_module: DistillationStep, batches: Batches, device: torch.device
) -> tuple[Batches, bool]:
    """Run the first batch without a step: terms are settled, projections made, errors found.

    Returns the batches, which from now on check their labels, and whether some parameter to be
    trained has no part in the loss. Generators, buffers and
    gradients are left as they were. Raises `TrainError` for data without a batch, a loss that
    reaches no parameter, and one that isn't finite; `InputError` for labels without a class.
    """
    student, objective = step_module.student, step_module.objective
    buffers = [(buffer, buffer.detach().clone()) for buffer in student.buffers()]
    student.train()
    with rng_state_kept(batches.generators):
        first = next(batches.epoch(0), None)
    if first is None:
        raise TrainError("data= is empty: it gave no batch")
    batch = moved(first, device)
    try:
        with rng_state_kept():
            taught = step_module.teach(batch)
            outputs = step_module.outputs(batch)
        batches = batches.with_classes(class_count(batch, outputs))
        with rng_state_kept():  # projections follow from the seed, not from what data drew
            objective.fit(outputs, taught)
        with rng_state_kept():
            values = objective.losses(outputs, batch, taught)
            total = objective.total(values)
            used = _reached(total, step_module.trained())
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    wrong = not_finite({name: value.item() for name, value in values.items()})
    if wrong:
        raise TrainError(
            f"the first batch gives {', '.join(wrong)} that aren't finite; look for NaN in its "
            "values, in the student's weights and in the teacher's outputs"
        )
    return batches, not all(used)


def _reached(total: Tensor, parameters: list[nn.Parameter]) -> list[bool]:
    if total.requires_grad:
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        used = [gradient is not None for gradient in gradients]
        if any(used):
            return used
    raise TrainError(
        "the loss reaches no parameter of the student: its outputs are detached, or all it learns "
        "from is frozen"
    )
