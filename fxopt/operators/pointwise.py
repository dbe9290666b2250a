"""Operators that work entry by entry, over operands that broadcast."""

from __future__ import annotations

import torch

aten = torch.ops.aten

UNTAGGED_POINTWISE = (
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.floor_divide.default,
    aten.rsub.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
)
"""Such that a version of torch doesn't tag as `torch.Tag.pointwise`."""
