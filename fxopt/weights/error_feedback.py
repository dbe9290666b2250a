"""Error feedback: the columns of a weight changed in order, each change made up for by the rest.

With H = Σ x xᵀ over inputs x, the error of a row w that becomes q is (w - q) H (w - q)ᵀ. With
H⁻¹ = UᵀU, U upper triangular, it is made up for best when w_k becomes q_k where the columns to come
are moved by

    w_j  <-  w_j - (w_k - q_k) / U_kk * U_kj        for j > k

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.errors import PassError

_BLOCK = 128
"""Columns whose feedback beyond themselves is applied as one matrix product."""

_LEAST_DAMPING, LARGEST_DAMPING = 1e-3, 1.0
_SMALL = 32


def feed_back(
    left: Tensor, factor: Tensor, settle: Callable[[int], Tensor], stride: int | None = None
) -> None:
    """Settle the columns of a weight in order, each error fed back to those to come.

    `left` `[K, N]` float32 holds a column a row and is changed in place; `factor` is U `[K, K]`.
    `settle(k)` reads `left[k]`, when all feedback has arrived there, and gives w_k - q_k `[N]`. At
    the multiples of `stride` all of the next `stride` columns have theirs.
    """
    columns = len(left)
    stride = stride or max(1, columns)
    for start in range(0, columns, stride):
        for first in range(start, start + stride, _BLOCK):
            last = min(first + _BLOCK, start + stride)
            errors = torch.empty_like(left[first:last])
            pivots = factor.diagonal()[first:last].tolist()
            for k in range(first, last):
                error = torch.div(settle(k), pivots[k - first], out=errors[k - first])
                left[k + 1 : last].addr_(factor[k, k + 1 : last], error, alpha=-1)
            left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)


def settle_in_order(
    weight: Tensor,
    moment: Tensor,
    damping: float,
    settle: Callable[[int, Tensor], Tensor],
    order: bool,
    stride: int | None = None,
) -> None:
    """Settle the columns of `weight` `[N, K]`, with `order` those of large inputs first.

    `settle(place, waiting)` gives what column `place` of the weight becomes `[N]`, float32;
    `waiting[0]` is what it should be by now, and the columns to come follow it. `moment` `[K, K]`
    is normalised, `stride` as `feed_back` has it, in the weight's own order alone.
    """
    left = weight.detach().t().to(torch.float32, copy=True).contiguous()
    places = list(range(len(left)))
    if order:
        permutation = moment.diagonal().argsort(descending=True, stable=True)
        left, moment = left[permutation], moment[permutation][:, permutation]
        places = permutation.tolist()
    factor = inverse_factor(moment, damping)
    feed_back(left, factor, lambda k: left[k] - settle(places[k], left[k:]), stride)


def errs_less(weight: Tensor, other: Tensor, plain: Tensor, moment: Tensor) -> Tensor:
    """bool `[N, 1]`: the rows of `weight` that `other` errs less on than `plain`, all float64.

    For D = w - q, a symmetric H and errors e = D H Dᵀ:  e₁ - e₂ = (D₁ - D₂) H (D₁ + D₂)ᵀ, one
    product for two; the difference may be small beside both. NaN, from a row so large that its
    feedback overflowed, is no gain.
    """
    one, two = weight - plain, weight - other
    return ((one - two) @ moment).mul_(one + two).sum(-1, keepdim=True) > 0


def normalised_moment(moment: Tensor, device: torch.device) -> Tensor:
    """The moment in units of its mean diagonal, so that neither large nor small inputs overflow."""
    moment = moment.detach().to(device, torch.float32)
    diagonal = moment.diagonal().double()
    if not bool(moment.isfinite().all()) or bool((diagonal < 0).any()):
        raise PassError(
            "second_moment holds NaN, infinity or a negative diagonal, so it is no sum of x xᵀ. "
            "Look for infinity in the calibration inputs, or choose a method that needs none."
        )
    live = diagonal[diagonal > 0]
    mean = float(live.mean()) if live.numel() else 1.0
    if mean < torch.finfo(torch.float32).tiny:
        return (moment.double() / mean).float()
    return moment / mean


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U [K, K], upper triangular, float32, with (H + damping)⁻¹ = UᵀU.

    From one factorization of H read backwards: with J H J = L Lᵀ for the exchange matrix J, U is
    the inverse of J L J.
    """
    lower = _cholesky(moment, damping, torch.float32)
    share = damping
    while lower is None:
        lower = _cholesky(moment, share, torch.float64)
        if lower is None and share >= LARGEST_DAMPING:
            raise PassError(
                f"second_moment stays indefinite with {share:g} of its mean diagonal added, so it "
                "is no sum of x xᵀ. Give the matrix that SecondMoment accumulates, or choose a "
                "method that needs none."
            )
        share = min(LARGEST_DAMPING, max(share, _LEAST_DAMPING) * 10.0)
    upper = lower.flip((0, 1))
    _invert_upper(upper)
    return upper.to(torch.float32)


def _invert_upper(upper: Tensor) -> None:
    """In place, by halves: [[A, B], [0, C]]⁻¹ = [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]].

    A third of the time of solving against the identity, and without holding it.
    """
    half = len(upper) // 2
    if half < _SMALL:
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    corner.copy_((first @ corner @ last).neg_())


def _cholesky(moment: Tensor, share: float, dtype: torch.dtype) -> Tensor | None:
    """L with J (H + share) J = L Lᵀ, or None where that isn't positive definite in `dtype`.

    A column whose input was always zero has nothing to weigh its error by; a one on the diagonal
    leaves it to be rounded to the nearest.
    """
    backwards = moment.flip((0, 1)).to(dtype)
    diagonal = backwards.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0).add_(share)
    lower, info = torch.linalg.cholesky_ex(backwards)
    failed = bool(info) or not bool(lower.diagonal().isfinite().all())
    return None if failed else lower
