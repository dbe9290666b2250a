"""Dropout(x, p, train): x in evaluation mode, and zeros in random places of x / (1 - p) else."""

from __future__ import annotations

import torch

aten = torch.ops.aten

SCALING_DROPOUT = (aten.dropout.default, aten.feature_dropout.default)
"""Dropout that puts zeros in place of what it drops."""

DROPOUT = (*SCALING_DROPOUT, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)

DROPOUT_IN_PLACE = (
    aten.dropout_.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout_.default,
    aten.feature_alpha_dropout_.default,
)
