"""Weights rounded to four bits with a scale and a zero point for each group of columns.

    W ~ (Q - z) * s       Q integer in [-8, 7], s and z per row and group of columns

For given Q the s and z of the least squared error are those of a line through the points (Q, W).
Which Q is searched: those that the range of a group gives where it is stretched to a few more and a
few less steps than 15, which clips its ends.

nearest     every column counts the same
weighted    a column counts as much as the mean square of its inputs
hqq         outliers count less, by half-quadratic splitting (`half_quadratic`)
gptq        the columns of a weighted fit, rounded with error feedback; then s and z once more, by
            least squares of the outputs, and feedback on the grid that they give

Source: `make_qkx2_quants` of llama.cpp (ggml-quants.c), with its importance matrix for "weighted";
the zero point is no integer, as in HQQ: Badri, Shaji, "Half-Quadratic Quantization of Large Machine
Learning Models" (2023); error feedback: Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxopt.errors import PassError
from fxopt.weights.error_feedback import normalised_moment, settle_in_order
from fxopt.weights.gptq import better_rows, refuse_non_finite
from fxopt.weights.grid_refit import refitted_lines
from fxopt.weights.half_quadratic import half_quadratic

Fitting = Literal["nearest", "hqq", "weighted", "gptq"]

LOW, STEPS = -8, 15
_STRETCHED = (0.0, -0.9, -0.6, -0.3, 0.3, 0.6, 0.9, 1.2)
"""What is added to the 15 steps of a group's range: first nothing, which a grid of 15 wants."""
_MOST_OFFSET = 1024.0
"""Steps from zero to a group beyond which its values are as good as one."""
_CHUNK_ELEMENTS = 1 << 18
_NORMAL = torch.finfo(torch.float16)
_DAMPING = 0.01
_ROUNDS = 2
"""Feedback, each time on the grid that fits best to the integers of the time before."""

Lines = tuple[Tensor, Tensor]
"""Scales and zero points, float32 [N, K / group]."""


class AffineWeight(NamedTuple):
    """`(values - zero_point) * scale`: int8 [N, K] in [-8, 7], and two of float [N, K / group]."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def affine_groups(
    weight: Tensor,
    group: int,
    method: Fitting = "nearest",
    second_moment: Tensor | None = None,
) -> AffineWeight:
    """`weight` [N, K], K a multiple of `group`, in four bits.

    "nearest" has the least squared error found, "hqq" one that spares outliers. "weighted" and
    "gptq" need `second_moment` [K, K], the sum of x xᵀ over inputs x in any unit; no row of either
    errs more on these inputs than the nearest.

    Scales and zero points are float16, or float32 where float16 has no scale as small or as large.
    Raises `KernelError` for a weight that holds NaN or infinity, and `PassError` for a moment that
    is none or is missing.
    """
    refuse_non_finite(weight, "affine_groups")
    weight = weight.detach()
    nearest = _rounded(weight, group, _fitted_lines(weight, group, None))
    if method == "nearest" or not weight.numel():
        return nearest
    if method == "hqq":
        lines = half_quadratic(weight, group, *_wide(nearest), LOW, STEPS)
        return _rounded(weight, group, lines)
    inner = weight.shape[1]
    if second_moment is None or second_moment.shape != (inner, inner):
        given = "none" if second_moment is None else f"of {tuple(second_moment.shape)}"
        raise PassError(
            f"affine_groups(method={method!r}) needs second_moment, float [{inner}, {inner}]: the "
            f"sum of x xᵀ over the inputs of this weight; given was {given}"
        )
    with torch.no_grad():
        moment = normalised_moment(second_moment, weight.device)
        weighted = weighted_groups(weight, group, moment.diagonal())
        found = _better(weight, nearest, weighted, moment)
        if method == "gptq":
            grid = weighted
            for _ in range(_ROUNDS):
                fed_back = _fed_back(weight, grid, group, moment)
                found = _better(weight, found, fed_back, moment)
                lines = refitted_lines(weight, *fed_back, moment)
                grid = _with_lines(fed_back.values, lines)
                found = _better(weight, found, grid, moment)
    return found


def weighted_groups(weight: Tensor, group: int, power: Tensor) -> AffineWeight:
    """`weight` [N, K], finite, a column of which counts as much as its `power` [K]."""
    return _rounded(weight, group, _fitted_lines(weight, group, power))


def dense_groups(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What an affine weight stands for, float64 [N, K]."""
    rows, groups = scale.shape
    steps = values.view(rows, groups, -1).double() - zero_point.double().unsqueeze(2)
    return (steps * scale.double().unsqueeze(2)).view(values.shape)


def _rounded(weight: Tensor, group: int, lines: Lines) -> AffineWeight:
    """The nearest integers on the grid of `lines`."""
    found = _with_lines(torch.empty(weight.shape, dtype=torch.int8, device=weight.device), lines)
    groups, values = weight.reshape(-1, group), found.values.view(-1, group)
    scale, zero_point = (number.view(-1, 1) for number in found[1:])
    size = max(1, _CHUNK_ELEMENTS // group)
    for q, x, s, z in zip(
        *(tensor.split(size) for tensor in (values, groups, scale, zero_point)), strict=True
    ):
        q.copy_((x.to(torch.float32) / s.float()).add_(z.float()).round_().clamp_(LOW, LOW + STEPS))
    return found


def _with_lines(values: Tensor, lines: Lines) -> AffineWeight:
    scale, zero_point = lines
    fits = bool(((scale >= _NORMAL.tiny) & (scale <= _NORMAL.max)).all())
    dtype = torch.float16 if fits else torch.float32
    return AffineWeight(values, scale.to(dtype), zero_point.to(dtype))


def _wide(found: AffineWeight) -> Lines:
    return found.scale.float(), found.zero_point.float()


def _better(
    weight: Tensor, plain: AffineWeight, other: AffineWeight, moment: Tensor
) -> AffineWeight:
    """Each row as the one of both has it that errs less on the inputs of `moment`."""
    dtype = torch.promote_types(plain.scale.dtype, other.scale.dtype)
    one, two = (
        AffineWeight(q.clone(), s.to(dtype, copy=True), z.to(dtype, copy=True))
        for q, s, z in (plain, other)
    )
    better_rows(weight, one, two, moment, dense_groups)
    return one


def _fed_back(weight: Tensor, grid: AffineWeight, group: int, moment: Tensor) -> AffineWeight:
    """Rounded on the scales and zero points of `grid`, columns of large inputs first."""
    scale, zero_point = (number.t().contiguous() for number in _wide(grid))
    q = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def rounded(place: int, waiting: Tensor) -> Tensor:
        s, z = scale[place // group], zero_point[place // group]
        integers = (waiting[0] / s).add_(z).round_().clamp_(LOW, LOW + STEPS)
        q[place] = integers
        return integers.sub_(z).mul_(s)

    settle_in_order(weight, moment, _DAMPING, rounded, order=True)
    return AffineWeight(q.t().contiguous(), grid.scale, grid.zero_point)


def _fitted_lines(weight: Tensor, group: int, power: Tensor | None) -> Lines:
    """Lines of the least squared error, each column counting as much as `power` [K], or alike."""
    rows, inner = weight.shape
    groups = weight.reshape(-1, group)
    size = max(1, _CHUNK_ELEMENTS // group)
    if power is None:
        counts = torch.full((inner // group, group), 1.0 / group, device=weight.device)
    else:
        counts = _shares(power.view(-1, group))
    fitted = []
    for first in range(0, len(groups), size):
        x = groups[first : first + size].t().to(torch.float32).contiguous()
        place = torch.arange(first, first + x.shape[1], device=x.device) % len(counts)
        count = counts[:1].t() if power is None else counts[place].t().contiguous()
        fitted.append(_fitted(x, count))
    shape = rows, inner // group
    empty = weight.new_empty(shape, dtype=torch.float32)
    if not fitted:
        return empty, empty
    scale, zero_point = (torch.cat([pair[index] for pair in fitted]) for index in range(2))
    return scale.view(shape), zero_point.view(shape)


def _shares(power: Tensor) -> Tensor:
    """Of each column in the sum of its group [G, g]; alike where nothing ever came."""
    whole = power.double().sum(1, keepdim=True)
    alike = torch.full_like(power, 1.0 / power.shape[1], dtype=torch.float64)
    return torch.where(whole > 0, power.double() / whole, alike).float()


def _fitted(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [R] of groups [g, R], which columns hold.

    `count` [g, R] or [g, 1] is what each value counts; the sum over a group is 1.
    """
    unit = x.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    x = x / unit
    low, mean = x.amin(0), (x * count).sum(0)
    width, centred, above = x.amax(0) - low, x - mean, x - low
    best = torch.full_like(low, -torch.inf)
    slope, center = torch.zeros_like(low), torch.zeros_like(low)
    for stretch in _STRETCHED:
        steps = (above * ((STEPS + stretch) / width)).round_().clamp_(0, STEPS)
        counted = steps * count
        middle, shared = counted.sum(0), (counted * centred).sum(0)
        line = shared / ((counted * steps).sum(0) - middle.square())
        # What the line explains of the squares of `centred`.
        explained = line * shared
        better = explained > best
        best = torch.where(better, explained, best)
        slope, center = torch.where(better, line, slope), torch.where(better, middle, center)
    zero_point = LOW + center - mean / slope
    # Of values that are all alike the sign and the magnitude are all there is to keep.
    alike = ~(slope > 0) | (zero_point.abs() > _MOST_OFFSET)
    scale = torch.where(alike, mean.abs(), slope) * unit
    return torch.where(scale > 0, scale, 1.0), torch.where(alike, 0.0, zero_point)
