"""The distances that the terms stand for, on plain tensors.

`keep` says which rows count; the mean is over these, and a batch without any gives 0. What is below
float32 is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def logits_divergence(
    student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None = None
) -> Tensor:
    """T² · mean over rows of KL(softmax(teacher / T) ‖ softmax(student / T)).

    `student`, `teacher`: `[..., classes]`; `keep`: bool `[...]`.
    """
    log_student = functional.log_softmax(_wide(student) / temperature, dim=-1)
    log_teacher = functional.log_softmax(_wide(teacher) / temperature, dim=-1)
    # Through log_target a teacher's probability of 0 (a logit of -inf) would give 0 · inf.
    probable = log_teacher.exp()
    rows = (torch.xlogy(probable, probable) - probable * log_student.clamp_min(_LOG_ZERO)).sum(-1)
    return temperature**2 * _mean(rows, keep)


def hidden_mse(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean square difference of `[..., width]` states over the rows that count and the width."""
    return _mean((_wide(student) - _wide(teacher)).square().mean(-1), keep)


def hidden_cosine(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean over the rows that count of 1 - cos(student, teacher), both `[..., width]`."""
    return _mean(1 - functional.cosine_similarity(_wide(student), _wide(teacher), dim=-1), keep)


def attention_kl(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean over heads and queries of KL(teacher ‖ student), both `[batch, heads, queries, keys]`.

    `keep`: bool `[batch, queries]`. Another number of heads: both are averaged over heads first.
    """
    student, teacher = _heads(student, teacher)
    log_student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    rows = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)
    return _mean(rows, _over_heads(keep, rows))


def attention_mse(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """As `attention_kl`, but the mean square difference over heads, queries and keys."""
    student, teacher = _heads(student, teacher)
    rows = (student - teacher).square().mean(-1)
    return _mean(rows, _over_heads(keep, rows))


_LOG_ZERO = -1e30


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean(rows: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return rows.mean()
    # A row that doesn't count may hold a NaN, which 0 · NaN wouldn't drop.
    return rows.where(keep, 0).sum() / keep.sum().clamp_min(1)


def _heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = _wide(student), _wide(teacher)
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def _over_heads(keep: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if keep is None else keep.unsqueeze(1).expand_as(rows)
