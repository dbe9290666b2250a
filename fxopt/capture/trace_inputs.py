"""The inputs of a trace: copies, each tensor once, and which of their axes are dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import Dim


def distinct_tensors(named: Mapping[str, Any]) -> Any:
    """The inputs with a tensor given twice, as in attention(x, x, x), copied the second time.

    torch.export would take them for one input.
    """
    seen: set[int] = set()

    def distinct(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(distinct, dict(named))


def dynamic_shapes(value: Any) -> Any:
    """The dynamic axes of each tensor in `value`, nested as torch.export asks for it.

    Python's own containers stay; a registered class is what its flattening gives.
    """

    def is_registered(part: Any) -> bool:
        return type(part) in pytree.SUPPORTED_NODES and type(part) not in pytree.BUILTIN_TYPES

    def shapes(part: Any) -> Any:
        if not is_registered(part):
            return _dynamic_axes(part)
        children, _ = pytree.SUPPORTED_NODES[type(part)].flatten_fn(part)
        return pytree.tree_map(shapes, children, is_leaf=is_registered)

    return pytree.tree_map(shapes, value, is_leaf=is_registered)


def _dynamic_axes(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {axis: Dim.AUTO for axis, size in enumerate(leaf.shape) if size > 1}


def double_batch(named: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with their one row twice; None where one has no such axis."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(named)) if isinstance(leaf, Tensor)]
    if not all(tensor.ndim and tensor.shape[0] == 1 for tensor in tensors):
        return None

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(double, dict(named))  # type: ignore[no-any-return]


def copied_inputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with a copy in place of each tensor: what the model writes isn't the user's."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copied, dict(named))  # type: ignore[no-any-return]
