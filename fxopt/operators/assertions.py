"""Assertions: operators that raise at run time where a size or an entry isn't as expected.

The functional ones take and give a token, an empty tensor that keeps them in order.
"""

from __future__ import annotations

from typing import Any

import torch

_ASSERTIONS = frozenset(
    f"aten::{name}"
    for name in (
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "_functional_sym_constrain_range",
        "_functional_sym_constrain_range_for_size",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    )
)


def is_assertion(target: Any) -> bool:
    """Whether a node's target asserts something, and computes nothing."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in _ASSERTIONS
