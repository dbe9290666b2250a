"""Weights rounded to few bits: to the nearest, or with error feedback (GPTQ).

    W ~ Q * s       Q integer in [-L, L], L = 2^(bits-1) - 1, s per row or per group of columns

"nearest" takes the closest Q. "gptq" weighs errors by what they do to the outputs on given inputs:
with H = Σ x xᵀ the error of row w is (w - qs) H (w - qs)ᵀ. It rounds one column after the other and
moves the columns to come so that they make up for the error best (`error_feedback`).

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023. A row that comes out no better than the nearest
stays nearest, so no row is ever worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fxopt.errors import KernelError, PassError
from fxopt.kernels import quantize_weight
from fxopt.kernels.quantization import row_scale
from fxopt.weights.error_feedback import (
    LARGEST_DAMPING,
    errs_less,
    normalised_moment,
    settle_in_order,
)

Rounding = Literal["nearest", "gptq"]

_CHUNK_ELEMENTS = 1 << 18
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
        fed_back = _fed_back(weight, nearest[1], largest, group, moment, damping, order)
        better_rows(weight, nearest, fed_back, moment, _dense)
    return nearest


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
    if not 0.0 <= damping <= LARGEST_DAMPING:
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
    refuse_non_finite(weight, "quantize_rows")


def refuse_non_finite(weight: Tensor, name: str) -> None:
    """Raise `KernelError`, from `name`, for a weight that holds NaN or infinity; names the row."""
    for first, last in _chunks(weight):
        finite = weight.detach()[first:last].isfinite().all(-1)
        if not bool(finite.all()):
            row = first + int((~finite).nonzero()[0])
            raise KernelError(
                f"{name}: output channel {row} holds NaN or infinity; integers cannot "
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
            scale[first:last] = row_scale(wide, largest)
            q[first:last] = _round(wide, scale[first:last], largest)
    return q.view(count, inner), scale.view(count, groups)


def _round(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (values * scale.reciprocal()).round_().clamp_(-largest, largest)


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        yield first, min(first + step, rows.shape[0])


def _fed_back(
    weight: Tensor,
    scale: Tensor,
    largest: int,
    group: int | None,
    moment: Tensor,
    damping: float,
    order: bool,
) -> tuple[Tensor, Tensor]:
    """q [N, K] and scale [N, groups], rounded column by column with the scales given first."""
    size = group or weight.shape[1]
    # Rounded out of order, a group has no first column to take its scale from.
    stride = None if order else group
    scale = scale.t().clone(memory_format=torch.contiguous_format)
    q = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def rounded(place: int, waiting: Tensor) -> Tensor:
        if stride and place % stride == 0:
            scale[place // stride] = row_scale(waiting[:stride].t(), largest).view(-1)
        unit = scale[place // size]
        integers = _round(waiting[0], unit, largest)
        q[place] = integers
        return integers.mul_(unit)

    settle_in_order(weight, moment, damping, rounded, order, stride)
    return q.t().contiguous(), scale.t().contiguous()


def better_rows(
    weight: Tensor,
    plain: Sequence[Tensor],
    other: Sequence[Tensor],
    moment: Tensor,
    dense: Callable[..., Tensor],
) -> None:
    """The rows of `plain` become those of `other` where these err less, in place.

    Both hold integers, scales and what else a row of `weight` is rounded to, rows first; `dense`
    makes float64 `[rows, K]` of them.
    """
    wide = moment.double()
    for first, last in _chunks(weight):
        part = slice(first, last)
        two, one = (dense(*(tensor[part] for tensor in pair)) for pair in (other, plain))
        better = errs_less(weight.detach()[part].double(), two, one, wide)
        for kept, new in zip(plain, other, strict=True):
            kept[part] = torch.where(better, new[part], kept[part])


def _dense(q: Tensor, scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    return (q.double().view(rows, groups, -1) * scale.double().unsqueeze(2)).view(q.shape)
