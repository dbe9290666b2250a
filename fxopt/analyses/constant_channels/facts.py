"""The walk over a graph that holds what is known so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxopt.analyses.constant_channels.known import Known
from fxopt.nodes import fake
from fxopt.program import Program

LARGEST = 1 << 20
"""Entries; facts of more are forgotten after their last use, since only a constant has them."""

_CHECKED = 1 << 16


@dataclass
class Facts:
    """What is known of each value, and of each tensor in a list of them."""

    program: Program
    found: dict[fx.Node, Known] = field(default_factory=dict)
    lists: dict[fx.Node, list[Known | None]] = field(default_factory=dict)
    uses: Counter[fx.Node] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        nodes = self.program.graph.nodes
        self.uses = Counter(used for node in nodes for used in node.all_input_nodes)

    def of(self, operand: Any) -> Known | None:
        """What is known of an operand; a number is known, and of rank 0."""
        if isinstance(operand, (bool, int, float)):
            return Known.everywhere(torch.tensor(float(operand), dtype=torch.float64))
        if not isinstance(operand, fx.Node):
            return None
        if operand not in self.found and operand.op == "get_attr":
            state = self._state(str(operand.target))
            if state is not None:
                self.found[operand] = state
        return self.found.get(operand)

    def _state(self, name: str) -> Known | None:
        if name in self.program.written:
            return None
        tensor = self.program.tensor(name).detach()
        if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_quantized:
            return None
        known = Known.everywhere(tensor)
        if tensor.numel() > _CHECKED or not tensor.is_floating_point():
            return known  # a NaN in it shows in what is computed from it
        finite = tensor.isfinite()
        return known if bool(finite.all()) else known.only(finite)

    def settle(self, known: Known | None, value: Tensor) -> Known | None:
        """`known` in the form that holds for `value`: its rank and device, finite, not empty."""
        if known is None or value.is_complex():
            return None
        if value.ndim > known.ndim:
            shape = (1,) * (value.ndim - known.ndim) + tuple(known.shape)
            known = known.map(lambda t: t.reshape(shape))
        for axis, size in enumerate(map(fixed_size, value.shape)):
            if size is None:
                known = known.along(axis)
            elif size == 0:
                return None
        if known.mask.numel() <= LARGEST:
            if known.values.is_floating_point():
                known = known.only(known.values.isfinite())
            if not bool(known.mask.any()):
                return None
        return known.map(lambda t: t.to(value.device))

    def release(self, node: fx.Node) -> None:
        """Forget the large facts that `node` was the last to use."""
        for used in node.all_input_nodes:
            self.uses[used] -= 1
            known = self.found.get(used)
            if known is None or self.uses[used]:
                continue
            if used.op == "get_attr" or known.mask.numel() > LARGEST:
                del self.found[used]


Finding: TypeAlias = "Known | list[Known | None] | None"
"""What is known of a value: of a tensor, of each of several tensors, or nothing."""

Handler: TypeAlias = Callable[[Facts, fx.Node, Mapping[str, Any]], Finding]
"""What is known of a node's value, given its arguments by schema name."""


def handlers_of(handler: Handler, *targets: Any) -> dict[Any, Handler]:
    """A table that gives each of `targets` one handler."""
    return dict.fromkeys(targets, handler)


def size_of(operand: Any, axis: int) -> int | None:
    """The size of an axis where it is the same in every call."""
    return fixed_size(fake(operand).shape[axis])


def fixed_size(size: Any) -> int | None:
    """A size that is the same in every call, or None; a symbol may stand for a number by now."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None
