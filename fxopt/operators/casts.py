"""Operators that change the dtype or device of their first operand, or nothing at all."""

from __future__ import annotations

import torch

aten = torch.ops.aten

CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
"""To another dtype, device or layout, which may be those that it has."""

ALIASES = (
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
)
"""The operand itself, where its strides allow it."""

COPIES = (aten.clone.default, aten.lift_fresh_copy.default)
"""The operand's entries in new memory."""

UNCHANGED = (*ALIASES, *COPIES)
"""The operand's entries in its sizes."""
