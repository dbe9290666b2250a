"""A constant matrix against a value of which some channels are known.

    y_j = b_j + sum over i of W_ji x_i  is constant  where W_ji = 0 for every i that isn't known

Weights are looked at in their own dtype and never widened whole: of each row a few entries, and all
of those rows in which the few are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.analyses.constant_channels.known import Known

PROBED = 16
"""Entries of a row, or of a column, that are looked at first."""

_PATTERNS = 16
"""Different sets of known channels along the other axes that are told apart."""

_MOST_PRODUCTS = 1 << 27
_CHUNK_ELEMENTS = 1 << 20


def dead_rows(weight: Tensor, unknown: Tensor) -> Tensor:
    """The rows of `weight` [N, K] that are zero wherever `unknown` [N or 1, K] holds: int64."""
    step = max(1, weight.shape[1] // PROBED)
    probe = ((weight[:, ::step] != 0) & unknown[:, ::step]).any(1)
    rows = (~probe).nonzero().flatten()
    if not len(rows):
        return rows
    rest = weight if len(rows) == len(weight) else weight[rows]
    live = ((rest != 0) & (unknown if len(unknown) == 1 else unknown[rows])).any(1)
    return rows[~live]


def contracted(weight: Tensor, x: Known | None) -> Known | None:
    """Facts of x @ Wᵀ, [..., N], for those of x [..., K] and W [N, K]."""
    count, inner = weight.shape
    if x is None:
        rows = dead_rows(weight, torch.ones(1, inner, dtype=torch.bool, device=weight.device))
        return placed(rows, torch.zeros(len(rows), dtype=torch.float64), count, weight)
    x = x.filled(-1, inner)
    if x.mask[..., 0].numel() * weight.numel() > _MOST_PRODUCTS:
        x = _only_last_axis(x)
    lead = x.shape[:-1]
    masks, values = x.mask.reshape(-1, inner), x.wide().reshape(-1, inner)
    patterns, which = masks.unique(dim=0, return_inverse=True)
    if len(patterns) > _PATTERNS:
        patterns = masks.all(0, keepdim=True)
        which = torch.zeros_like(which)
    out = Known(
        torch.zeros(len(masks), count, dtype=torch.bool, device=weight.device),
        torch.zeros(len(masks), count, dtype=torch.float64, device=weight.device),
    )
    for index, pattern in enumerate(patterns):
        here = (which == index).nonzero().flatten()
        rows = dead_rows(weight, ~pattern[None])
        out.mask[here[:, None], rows] = True
        out.values[here[:, None], rows] = _products(values[here] * pattern, weight, rows)
    return out.map(lambda t: t.reshape(*lead, count))


def _products(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """x @ W[rows]ᵀ in float64, a few rows at a time."""
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    parts = [x @ weight[some].double().t() for some in rows.split(step)]
    return torch.cat(parts, 1) if parts else x.new_zeros(len(x), 0)


def placed(rows: Tensor, values: Tensor, count: int, like: Tensor) -> Known | None:
    """`values` [n] at `rows` [n] of `count`."""
    if not len(rows):
        return None
    known = Known(
        torch.zeros(count, dtype=torch.bool, device=like.device),
        torch.zeros(count, dtype=torch.float64, device=like.device),
    )
    known.mask[rows] = True
    known.values[rows] = values.to(like.device)
    return known


def _only_last_axis(x: Known) -> Known:
    shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
    return x.channels(-1, x.shape[-1]).map(lambda t: t.reshape(shape))
