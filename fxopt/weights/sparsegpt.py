"""Weights with two of every four kept (2:4 sparsity): which two, and what the others become.

    W ~ W * m       m keeps, of every four along a row, the two of the largest importance

    magnitude   |W_nk|
    wanda       |W_nk| * sqrt(Σ x_k²)           over the calibration inputs x
    sparsegpt   W_nk² / U_kk²         (H + damping)⁻¹ = UᵀU with H = Σ x xᵀ and U upper triangular

"wanda" weighs a column by its inputs. "sparsegpt" goes through the columns in fours and moves the
columns to come so that they make up for what is dropped (`error_feedback`), and compares the
weights so moved. A row that comes out no better than wanda's is wanda's.
Sources: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models"
(Wanda), ICLR 2024; Frantar, Alistarh, "SparseGPT", ICML 2023.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fxopt.kernels.sparse24 import GROUP, row_chunks, two_of_four
from fxopt.weights.error_feedback import (
    errs_less,
    feed_back,
    inverse_factor,
    normalised_moment,
)

Importance = Literal["magnitude", "wanda", "sparsegpt"]

_DAMPING = 0.01


class ChannelPower:
    """`power`: the sum of squares of each channel over finite rows x, float64 [K]; empty before."""

    def __init__(self) -> None:
        self.power = torch.empty(0, dtype=torch.float64)
        self.rows = 0

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.rows * len(self.power)

    @property
    def is_constant(self) -> bool:
        """Whether all values seen are zero."""
        return self.rows > 0 and not bool(self.power.any())

    def update(self, value: Tensor) -> None:
        """Take in `value` [..., K]."""
        rows = value.detach().float().reshape(-1, value.shape[-1])
        finite = rows.isfinite().all(-1)
        if not bool(finite.all()):
            rows = rows[finite]
        if not rows.numel():
            return
        power = rows.square().sum(0, dtype=torch.float64)
        self.power = self.power + power if self.rows else power
        self.rows += rows.shape[0]


def mask24(weight: Tensor, norm: Tensor | None = None) -> Tensor:
    """bool `[N, K]`: true at the two of every four of `weight` with the largest |W_nk| * norm_k.

    Without `norm` `[K]` by magnitude. Of equal ones the larger weight is kept, then the one at the
    lower column. K is a multiple of 4, and `weight` holds no NaN.
    """
    return torch.cat([_mask(rows, norm) for rows in row_chunks(weight.detach())])


def masked24(weight: Tensor, norm: Tensor | None = None) -> Tensor:
    """`weight` `[N, K]` times its mask; contiguous, in its dtype."""
    rows = row_chunks(weight.detach())
    return torch.cat([part.where(_mask(part, norm), part.new_zeros(())) for part in rows])


def prune24(weight: Tensor, second_moment: Tensor) -> Tensor:
    """`weight` `[N, K]` made 2:4 sparse with error feedback from `second_moment` `[K, K]`.

    `second_moment` is the sum of x xᵀ over inputs x, in any unit. In the dtype of `weight`; no row
    errs more on these inputs than masked by Wanda's importance. Raises `PassError` for a moment
    that is none.
    """
    weight = weight.detach()
    moment = normalised_moment(second_moment, weight.device)
    fed_back = _fed_back(weight, inverse_factor(moment, _DAMPING)).to(weight.dtype)
    plain = masked24(weight, moment.diagonal().clamp_min(0).sqrt())
    wide = moment.double()
    parts = []
    for exact, one, two in zip(*map(row_chunks, (weight, plain, fed_back)), strict=True):
        better = errs_less(exact.double(), two.double(), one.double(), wide)
        parts.append(two.where(better, one))
    return torch.cat(parts)


def _mask(rows: Tensor, norm: Tensor | None) -> Tensor:
    score = rows.abs().to(torch.promote_types(rows.dtype, torch.float32))
    if norm is None:
        return two_of_four(score)
    # In units of the largest, so that no product overflows.
    norm = norm.to(score.device, torch.float64)
    weighed = score.double() * (norm / norm.max().clamp_min(torch.finfo(norm.dtype).tiny))
    return two_of_four(weighed, score)


def _fed_back(weight: Tensor, factor: Tensor) -> Tensor:
    """The pruned weight [N, K], float32, its columns dropped in fours."""
    left = weight.t().to(torch.float32, copy=True).contiguous()
    dropped = torch.empty_like(left[:GROUP], dtype=torch.bool)

    def pruned(k: int) -> Tensor:
        if k % GROUP == 0:
            four = slice(k, k + GROUP)
            score = (left[four] / factor.diagonal()[four, None]).square_()
            dropped.copy_(~two_of_four(score.t()).t())
        error = left[k].where(dropped[k % GROUP], 0.0)
        left[k] -= error
        return error

    feed_back(left, factor, pruned)
    return left.t().contiguous()
