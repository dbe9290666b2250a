"""Weights rounded to few bits: to the nearest, or with error feedback (GPTQ).

    W ~ Q * s       Q integer in [-L, L], L = 2^(bits-1) - 1, s per row or per group of columns

"nearest" takes the closest Q. "gptq" weighs errors by what they do to the outputs on given inputs:
with H = Σ x xᵀ the error of row w is (w - qs) H (w - qs)ᵀ. It rounds one column after the other and
moves the columns to come so that they make up for the error best. With H⁻¹ = UᵀU, U upper
triangular, and column k rounded from w_k to q_k s:

    w_j  <-  w_j - (w_k - q_k s) / U_kk * U_kj        for j > k

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023. A row that comes out no better than the nearest
stays nearest, so no row is ever worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fxopt.errors import KernelError, PassError
from fxopt.kernels import quantize_weight

Rounding = Literal["nearest", "gptq"]

_BLOCK = 128
"""Columns whose feedback beyond themselves is applied as one matrix product."""

_CHUNK_ELEMENTS = 1 << 18
_LEAST_DAMPING, _LARGEST_DAMPING = 1e-3, 1.0
_SMALL = 32
_USUAL_GROUPS = (256, 128, 64, 32, 16)


def quantize_rows(
    weight: Tensor,
    *,
    bits: int = 8,
    group: int | None = None,
    method: Rounding = "nearest",
    second_moment: Tensor | None = None,
    damping: float = 0.01,
    order: bool = False,
) -> tuple[Tensor, Tensor]:
    """int8 `[N, K]` of `bits` bits and float32 scales `[N, 1]`, or `[N, K/group]` with a `group`.

    `method="gptq"` needs `second_moment` `[K, K]`, the sum of x xᵀ over inputs x (in any unit);
    `damping` is added to its diagonal as a share of the mean, and `order=True` rounds the columns
    of large inputs first, with the scales of the untouched weight.

    Raises `KernelError` for a weight that is no matrix of finite numbers (naming the row) and
    `PassError` for options that don't fit.
    """
    _check(weight, bits, group, method, second_moment, damping)
    nearest = _nearest(weight, bits, group)
    if method == "nearest" or not weight.numel():
        return nearest
    assert second_moment is not None
    with torch.no_grad():
        moment = normalised_moment(second_moment, weight.device)
        largest = 2 ** (bits - 1) - 1
        fed_back = _Feedback(weight, nearest[1], largest, group, moment, damping, order).run()
        return _better_rows(weight, nearest, fed_back, moment)


def _check(
    weight: Tensor,
    bits: int,
    group: int | None,
    method: str,
    moment: Tensor | None,
    damping: float,
) -> None:
    if bits not in range(2, 9):
        raise PassError(f"quantize_rows(bits={bits!r}): give 2 to 8 bits")
    if method not in get_args(Rounding):
        raise PassError(f"quantize_rows(method={method!r}): give one of {get_args(Rounding)}")
    if not 0.0 <= damping <= _LARGEST_DAMPING:
        raise PassError(f"quantize_rows(damping={damping!r}): give a share between 0 and 1")
    if weight.dim() != 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise KernelError(f"quantize_rows needs a float matrix, not {weight.dtype} of {shape}")
    inner = weight.shape[1]
    if group is not None and (group < 1 or inner % group):
        divisors = [g for g in _USUAL_GROUPS if inner and inner % g == 0]
        hint = f" ({', '.join(map(str, divisors))})" if divisors else ""
        raise PassError(
            f"quantize_rows(group={group}): a row of {inner} columns can't be cut into groups of "
            f"{group}; give a divisor of {inner}{hint}, or None for one scale per row"
        )
    fits = moment is not None and moment.shape == (inner, inner) and moment.is_floating_point()
    if method == "gptq" and not fits:
        given = "none" if moment is None else f"{moment.dtype} of {tuple(moment.shape)}"
        raise PassError(
            f"quantize_rows(method='gptq') needs second_moment, float [{inner}, {inner}]: the sum "
            f"of x xᵀ over the inputs of this weight; given was {given}"
        )
    _refuse_non_finite(weight)


def _refuse_non_finite(weight: Tensor) -> None:
    for first, last in _chunks(weight):
        finite = weight.detach()[first:last].isfinite().all(-1)
        if not bool(finite.all()):
            row = first + int((~finite).nonzero()[0])
            raise KernelError(
                f"quantize_rows: output channel {row} holds NaN or infinity; integers cannot "
                "express it, leave this layer in floating point"
            )


def _nearest(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Each group as a row of its own, a few rows at a time."""
    count, inner = weight.shape
    groups = 1 if group is None else inner // group
    rows = weight.detach() if group is None else weight.detach().reshape(-1, group)
    if bits == 8:
        q, scale = quantize_weight(rows)
    else:
        largest = 2 ** (bits - 1) - 1
        q = torch.empty_like(rows, dtype=torch.int8, memory_format=torch.contiguous_format)
        scale = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=rows.device)
        for first, last in _chunks(rows):
            wide = rows[first:last].to(torch.float32)
            scale[first:last] = _scale(wide, largest)
            q[first:last] = _round(wide, scale[first:last], largest)
    return q.view(count, inner), scale.view(count, groups)


def _scale(rows: Tensor, largest: int) -> Tensor:
    # Below the smallest normal number the reciprocal is infinite.
    tiny = torch.finfo(torch.float32).tiny
    if not rows.shape[-1]:
        return rows.new_full((*rows.shape[:-1], 1), tiny)
    return (rows.abs().amax(-1, keepdim=True) / largest).clamp_min(tiny)


def _round(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (values * scale.reciprocal()).round_().clamp_(-largest, largest)


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        yield first, min(first + step, rows.shape[0])


def normalised_moment(moment: Tensor, device: torch.device) -> Tensor:
    """The moment in units of its mean diagonal, so that neither large nor small inputs overflow."""
    moment = moment.detach().to(device, torch.float32)
    diagonal = moment.diagonal().double()
    if not bool(moment.isfinite().all()) or bool((diagonal < 0).any()):
        raise PassError(
            "quantize_rows: second_moment holds NaN, infinity or a negative diagonal, so it is no "
            "sum of x xᵀ. Look for infinity in the calibration inputs, or use method='nearest'."
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
        if lower is None and share >= _LARGEST_DAMPING:
            raise PassError(
                f"quantize_rows: second_moment stays indefinite with {share:g} of its mean "
                "diagonal added, so it is no sum of x xᵀ. Give the matrix that SecondMoment "
                "accumulates, or use method='nearest'."
            )
        share = min(_LARGEST_DAMPING, max(share, _LEAST_DAMPING) * 10.0)
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


class _Feedback:
    """One run over the columns; `left` holds what is still to round, [K, N], a column a row."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        largest: int,
        group: int | None,
        moment: Tensor,
        damping: float,
        order: bool,
    ) -> None:
        columns = weight.shape[1]
        self.largest = largest
        self.group = group or columns
        # Rounded out of order, a group has no first column to take its scale from.
        self.late_scales = group is not None and not order
        self.permutation = (
            moment.diagonal().argsort(descending=True, stable=True) if order else None
        )
        self.scale = scale.t().clone(memory_format=torch.contiguous_format)
        self.left = weight.detach().t().to(torch.float32, copy=True).contiguous()
        if self.permutation is not None:
            self.left = self.left[self.permutation]
            moment = moment[self.permutation][:, self.permutation]
        self.factor = inverse_factor(moment, damping)
        self.q = torch.empty_like(self.left, dtype=torch.int8)
        self.places = (
            list(range(columns)) if self.permutation is None else self.permutation.tolist()
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """q [N, K] and scale [N, groups]."""
        for first, last in self._blocks():
            errors = self._block(first, last)
            self.left[last:].addmm_(self.factor[first:last, last:].t(), errors, alpha=-1)
        q = self.q
        if self.permutation is not None:
            q = torch.empty_like(q).index_copy_(0, self.permutation, q)
        return q.t().contiguous(), self.scale.t().contiguous()

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Cut so that a group begins where all feedback from earlier blocks has arrived."""
        columns = len(self.left)
        stride = self.group if self.late_scales else columns
        for start in range(0, columns, stride):
            for first in range(start, start + stride, _BLOCK):
                yield first, min(first + _BLOCK, start + stride)

    def _block(self, first: int, last: int) -> Tensor:
        """Round the columns [first, last); their errors over U's diagonal, [last - first, N]."""
        left, factor = self.left[first:last], self.factor[first:last, first:last]
        if self.late_scales and first % self.group == 0:
            whole = self.left[first : first + self.group].t()
            self.scale[first // self.group] = _scale(whole, self.largest).view(-1)
        errors = torch.empty_like(left)
        pivots = factor.diagonal().tolist()
        for k in range(last - first):
            scale = self.scale[self.places[first + k] // self.group]
            rounded = _round(left[k], scale, self.largest)
            self.q[first + k] = rounded
            torch.sub(left[k], rounded.mul_(scale), out=errors[k]).div_(pivots[k])
            left[k + 1 :].addr_(factor[k, k + 1 :], errors[k], alpha=-1)
        return errors


def _better_rows(
    weight: Tensor,
    nearest: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    moment: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows of `other` where they err less than the nearest, the nearest elsewhere.

    For D = w - qs, a symmetric H and errors e = D H Dᵀ:  e₁ - e₂ = (D₁ - D₂) H (D₁ + D₂)ᵀ, one
    product for two, in float64, since the difference may be small beside both.
    """
    (q, scale), (q2, scale2) = nearest, other
    wide = moment.double()
    for first, last in _chunks(weight):
        part = slice(first, last)
        exact = weight.detach()[part].double()
        one = exact - _dense(q[part], scale[part])
        two = exact - _dense(q2[part], scale2[part])
        gain = ((one - two) @ wide).mul_(one + two).sum(-1)
        # A NaN, from a row so large that its feedback overflowed, is no gain.
        better = (gain > 0).unsqueeze(1)
        q[part] = torch.where(better, q2[part], q[part])
        scale[part] = torch.where(better, scale2[part], scale[part])
    return q, scale


def _dense(q: Tensor, scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    return (q.double().view(rows, groups, -1) * scale.double().unsqueeze(2)).view(q.shape)
