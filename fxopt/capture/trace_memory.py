"""Which results of a trace are in the memory of an operand, by the storages that it had."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

aten = torch.ops.aten


def sharing_operand(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the result of `node` is, by the storages of the trace."""
    if node.target is aten.lift_fresh_copy.default:
        return None  # traced as `lift_fresh`, which doesn't copy
    if node.target is operator.getitem and _makes_each_result(node.args[0]):
        return None
    own = _storages(node)
    return next((used for used in node.all_input_nodes if own & _storages(used)), None)


def _makes_each_result(node: Any) -> bool:
    """Whether the results of `node` are memory of their own, as those of `topk` are, and neither
    parts of an operand, as those of `split` are, nor of one another."""
    results = [leaf for leaf in pytree.tree_leaves(node.meta["val"]) if isinstance(leaf, Tensor)]
    return len(_storages(node)) == len(results) and sharing_operand(node) is None


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
