"""Dropout(x, p, train): x where it doesn't train, else x scaled, random parts of it dropped."""

from __future__ import annotations

import torch

aten = torch.ops.aten

ZEROING_DROPOUT = (aten.dropout.default, aten.feature_dropout.default)
"""Dropout that puts zeros in place of what it drops: alpha dropout puts another number there."""

DROPOUT = (*ZEROING_DROPOUT, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)

DROPOUT_IN_PLACE = (
    aten.dropout_.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout_.default,
    aten.feature_alpha_dropout_.default,
)
