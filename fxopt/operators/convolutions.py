"""Convolutions: conv(x, W, b, stride, padding, dilation, groups), in one to three dimensions.

Weights are W [N, K / groups, *window], or W [K, N / groups, *window] where they are transposed.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

NUMBER_PADDED = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
"""Convolutions whose padding is a number for each axis."""

NAME_PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
"""Convolutions whose padding is "same" or "valid"."""

CONVOLUTIONS = (*NUMBER_PADDED, *NAME_PADDED)

TRANSPOSED_CONVOLUTIONS = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
