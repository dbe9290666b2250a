"""The optimizer and the schedule of its learning rate: defaults, or what the user handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fxopt.errors import TrainError

OptimizerChoice: TypeAlias = Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None
ScheduleChoice: TypeAlias = (
    Literal["linear", "constant"] | LRScheduler | Callable[[Optimizer, int], LRScheduler]
)
WARM_UP = 0.1
"""The share of the steps over which the linear schedule rises."""


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups with and without weight decay: vectors and scalars (biases, norms) have none."""
    trained = [one for one in parameters if one.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in trained if one.ndim > 1]},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    choice: OptimizerChoice,
    student: nn.Module,
    extra: Sequence[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """An optimizer over the student's parameters and `extra` ones.

    An instance gets `extra` as a further group, which `forget_extra` takes out again. Raises
    `TrainError` for an instance over other parameters, and for a factory that makes no optimizer.
    """
    if isinstance(choice, Optimizer):
        _check_covers(choice, student)
        if extra:
            choice.add_param_group({"params": list(extra)})
        return choice
    groups = parameter_groups([*student.parameters(), *extra])
    if choice is None:
        return AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    made = choice(groups)
    if not isinstance(made, Optimizer):
        raise TrainError(
            f"optimizer={choice!r:.60} returned {type(made).__name__}; give an optimizer, or a "
            "callable that makes one of parameter groups: functools.partial(torch.optim.SGD, lr=1)"
        )
    return made


def forget_extra(optimizer: Optimizer, extra: Sequence[nn.Parameter]) -> None:
    """Take the group of `extra`, and what was kept of it, out of an optimizer handed over."""
    gone = {id(one) for one in extra}
    for parameter in extra:
        optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if not gone & {id(p) for p in group["params"]}
    ]


def make_schedule(choice: ScheduleChoice, optimizer: Optimizer, steps: int | None) -> LRScheduler:
    """The schedule over `steps` optimizer steps; None where the data don't tell how many.

    Raises `TrainError` where the schedule must know them, and for one of another optimizer.
    """
    if isinstance(choice, LRScheduler):
        if choice.optimizer is not optimizer:
            raise TrainError("schedule= belongs to another optimizer than optimizer=")
        if len(choice.base_lrs) != len(optimizer.param_groups):
            raise TrainError(
                "schedule= doesn't know the projections that learn as well: give it as a callable "
                "(optimizer, steps)"
            )
        return choice
    if choice == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    if steps is None:
        raise TrainError(
            "the schedule must know the number of steps, and the data have no length: give steps= "
            "instead of epochs=, or schedule='constant'"
        )
    if choice == "linear":
        return LambdaLR(optimizer, _linear(steps))
    if isinstance(choice, str) or not callable(choice):
        raise TrainError(
            f"schedule={choice!r:.60}: must be 'linear', 'constant', an LRScheduler of optimizer=, "
            "or a callable (optimizer, steps) that makes one"
        )
    made = choice(optimizer, steps)
    if not isinstance(made, LRScheduler):
        raise TrainError(f"schedule={choice!r:.60} returned {type(made).__name__}, no LRScheduler")
    return made


def _linear(steps: int) -> Callable[[int], float]:
    """Up to 1 over the first tenth of the steps, down to 0 at the end; no step is at 0."""
    rising = int(WARM_UP * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(steps - step, 0) / max(steps - rising, 1)

    return factor


def _check_covers(optimizer: Optimizer, student: nn.Module) -> None:
    own = {id(one) for one in student.parameters()}
    given = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if given - own:
        raise TrainError(
            f"optimizer= holds {len(given - own)} parameters that aren't the student's. Make it "
            "over student.parameters(), after the student was moved to its device"
        )
