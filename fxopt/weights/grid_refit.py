"""Scales and zero points refitted to integers that stay: the least squared error of outputs.

    e(s, z) = (w - q̂) H (w - q̂)ᵀ,   q̂_k = s_g q_k + b_g,   b = -z s        H = Σ x xᵀ

is quadratic in the s_g and b_g of all groups of a row together, so its least is one system of
2 K / group equations. With d = w - q̂ for the present numbers, the change solves

    | QHQ  QH |   | ds |   | Σ q_k (d H)_k |
    | HQ   H  | · | db | = | Σ (d H)_k     |       each summed over the columns of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-4
_CHUNK_ELEMENTS = 1 << 22
_MOST_STEPS = 1024.0


def refitted_lines(
    weight: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 [N, K / group], for int8 `values` [N, K].

    `moment` [K, K] is normalised. A group whose line would fall, or cross zero far outside of it,
    keeps its numbers: the caller compares rows all the same.
    """
    rows, groups = scale.shape
    size = max(1, _CHUNK_ELEMENTS // (weight.shape[1] * max(1, 2 * groups)))
    wide = moment.double()
    constant = wide.view(groups, -1, groups, wide.shape[1] // groups).sum((1, 3))
    found = [
        _refitted(
            weight[part].double(), values[part], scale[part], zero_point[part], wide, constant
        )
        for part in (slice(first, first + size) for first in range(0, rows, size))
    ]
    new_scale, new_zero = (torch.cat([pair[index] for pair in found]) for index in range(2))
    return new_scale, new_zero


def _refitted(
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    moment: Tensor,
    constant: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, groups = scale.shape
    q = values.view(rows, groups, -1).double()
    size = q.shape[2]
    s, z = scale.double(), zero_point.double()
    left = weight - ((q - z.unsqueeze(2)) * s.unsqueeze(2)).view(weight.shape)
    pulled = (left @ moment).view(rows, groups, size)
    right = torch.cat([(pulled * q).sum(2), pulled.sum(2)], 1)
    system = weight.new_empty(rows, 2 * groups, 2 * groups)
    for one in range(groups):
        part = slice(one * size, (one + 1) * size)
        across = (q[:, one] @ moment[part]).view(rows, groups, size)
        system[:, one, :groups] = (across * q).sum(2)
        system[:, one, groups:] = system[:, groups:, one] = across.sum(2)
    system[:, groups:, groups:] = constant
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + _DAMPING).add_(torch.finfo(torch.float32).tiny)
    lower, failed = torch.linalg.cholesky_ex(system)
    change = torch.cholesky_solve(right.unsqueeze(2), lower).squeeze(2)
    new_scale = s + change[:, :groups]
    new_zero = (z * s - change[:, groups:]) / new_scale
    usable = (new_scale > 0) & (new_zero.abs() <= _MOST_STEPS) & (failed == 0).unsqueeze(1)
    usable &= (new_scale >= 0.5 * s) & (new_scale <= 2.0 * s)
    return torch.where(usable, new_scale, s).float(), torch.where(usable, new_zero, z).float()
