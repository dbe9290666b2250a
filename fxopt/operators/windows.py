"""Pooling and resampling: an entry is computed from a window of the last axes, channel by channel.

Where all of a window is one number, so is the result, but for means that take zeros of a border in.
Those with several results give the values first, and their indices next.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

aten = torch.ops.aten

MAX_POOLINGS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
"""Pooling to a maximum that gives the values alone."""

WINDOWED: Mapping[int, tuple[Any, ...]] = MappingProxyType(
    {
        1: (
            *(aten.max_pool1d.default, aten.max_pool1d_with_indices.default),
            *(aten.adaptive_max_pool1d.default, aten.adaptive_avg_pool1d.default),
            aten.avg_pool1d.default,
            *(aten.upsample_nearest1d.vec, aten.upsample_nearest1d.default),
            *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact1d.default),
            *(aten.upsample_linear1d.vec, aten.upsample_linear1d.default),
        ),
        2: (
            *(aten.max_pool2d.default, aten.max_pool2d_with_indices.default),
            *(aten.adaptive_max_pool2d.default, aten.adaptive_avg_pool2d.default),
            aten.avg_pool2d.default,
            *(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default),
            *(aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact2d.default),
            *(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default),
            *(aten._upsample_bilinear2d_aa.vec, aten._upsample_bilinear2d_aa.default),
            *(aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default),
            *(aten._upsample_bicubic2d_aa.vec, aten._upsample_bicubic2d_aa.default),
        ),
        3: (
            *(aten.max_pool3d.default, aten.max_pool3d_with_indices.default),
            *(aten.adaptive_max_pool3d.default, aten.adaptive_avg_pool3d.default),
            aten.avg_pool3d.default,
            *(aten.upsample_nearest3d.vec, aten.upsample_nearest3d.default),
            *(aten._upsample_nearest_exact3d.vec, aten._upsample_nearest_exact3d.default),
            *(aten.upsample_trilinear3d.vec, aten.upsample_trilinear3d.default),
        ),
    }
)
"""By the number of axes that a window has: maxima, means, and interpolations."""
