"""Recovery by distillation: a student learns from the model it was made of.

    from fxopt.train import Hidden, Logits, Task, distill

    done = distill(student, teacher, loader, terms=[Task(), Logits(temperature=4.0), Hidden()])
    print(done.history)

Inside another training loop, `DistillationLoss(teacher, terms)(outputs, batch)` is the loss.
"""

from fxopt.train.distill import distill
from fxopt.train.distillation_loss import DistillationLoss
from fxopt.train.history import Distilled, Evaluation, History
from fxopt.train.optimization import parameter_groups
from fxopt.train.terms import Attention, Hidden, Logits, Task

__all__ = [
    "Attention",
    "DistillationLoss",
    "Distilled",
    "Evaluation",
    "Hidden",
    "History",
    "Logits",
    "Task",
    "distill",
    "parameter_groups",
]
