"""What Autocast decides before it acts: each node's side, and the minimum cut between them.

A node's side is the table's, unless the user's policy, the range of half precision or a measured
sensitivity says otherwise, each with its reason. Constants cost nothing: they are stored in half
once (in training they are float32 masters, cast at every call, and count).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxopt.analyses.precision import (
    UNLISTED,
    CastGraph,
    Casts,
    OperatorPrecision,
    Placement,
    Reading,
    Side,
    Value,
    cheapest_placement,
    operator_precision,
    sure_high,
)
from fxopt.analyses.sensitivity import Candidate, measure_sensitivity, measured_batches
from fxopt.claim import Sqnr
from fxopt.nodes import label, module_path, size_at_capture
from fxopt.observation import extremes, past_range
from fxopt.passes.mixed_precision.half_precision import can_be_half
from fxopt.program import Program

aten = torch.ops.aten

Policy = tuple[tuple[str, Side], ...]
"""Globs over module paths or operators, each with a side; the last that matches a node counts."""

_MASK = {aten.scaled_dot_product_attention.default: 3}
"""The operand that an operator keeps within the range of half by itself."""


@dataclass(frozen=True)
class Sides:
    """The precision of each operation that reads or makes float32, and why some are pinned high."""

    of: Mapping[fx.Node, OperatorPrecision]
    pinned: Mapping[fx.Node, str] = field(default_factory=dict)

    def with_high(self, reasons: Mapping[fx.Node, str]) -> Sides:
        """These sides with some nodes pinned high."""
        high = {n: replace(self.of[n], side="high", reason=why) for n, why in reasons.items()}
        return Sides({**self.of, **high}, {**self.pinned, **reasons})

    def low(self) -> list[fx.Node]:
        """The nodes that are low by themselves."""
        return [node for node, found in self.of.items() if found.side == "low"]


def sides_of(program: Program, policy: Policy, everything: bool) -> Sides:
    """The sides by the table and `policy`; with `everything`, all that the table knows is low."""
    sides = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (_is_float32(node) or _operands(node)):
            sides[node] = _side(node, policy, everything)
    return Sides(sides)


def keep_in_range(
    program: Program, sides: Sides, dtype: torch.dtype
) -> tuple[Sides, tuple[str, ...]]:
    """These sides with what leaves the range of `dtype` on the calibration inputs pinned high.

    That is a node whose own values do, or those of an operand that it would read in half. With
    float16 the second result says what makes the ranges doubtful; bfloat16 holds all but the least
    floats that masks are made of.
    """
    asked = [node for node, found in sides.of.items() if found.side != "high"]
    read = {node: _read_in_half(node, sides.of[node]) for node in asked}
    watched = dict.fromkeys((*asked, *(one for operands in read.values() for one in operands)))
    found = extremes(program, watched)
    past = past_range(found, dtype)
    reasons = {}
    for node in asked:
        if node in past:
            reasons[node] = past[node]
            continue
        for operand in read[node]:
            if operand in past:
                reasons[node] = f"of its operand {operand.name}: {past[operand]}"
    return sides.with_high(reasons), found.warnings if dtype == torch.float16 else ()


def keep_costly(
    program: Program, sides: Sides, dtype: torch.dtype, budget: Sqnr
) -> tuple[Sides, tuple[str, ...]]:
    """These sides with the products that cost most at the outputs pinned high, until the rest keeps
    `budget`; and the table of what each costs."""
    products = {label(node): node for node in sides.low()}
    if not products:
        return sides, ()
    candidates = [Candidate(name, {node: _in_half(node, dtype)}) for name, node in products.items()]
    found = measure_sensitivity(program, candidates, measured_batches(program), budget)
    alone = {row.name: row.alone_db for row in found.rows}
    reasons = {
        products[name]: f"costs {alone[name]:.1f} dB alone: left in float32 by budget={budget}"
        for name in found.within(budget)
    }
    return sides.with_high(reasons), found.lines(12)


def place(program: Program, sides: Sides) -> Placement:
    """The placement of casts that moves the fewest bytes, at the example's sizes."""
    return cheapest_placement(cast_graph(program, sides))


def planned_casts(program: Program, placement: Placement) -> Casts:
    """The casts of a placement, those of float32 masters apart."""
    sizes = {node.name: _cast_bytes(node) for node in program.graph.nodes}
    masters = {node.name for node in program.graph.nodes if node.op == "get_attr"}
    cast = (*placement.down, *placement.up)
    weights = [sizes[name] for name in cast if name in masters]
    activations = [sizes[name] for name in cast if name not in masters]
    return Casts(len(weights), sum(weights), len(activations), sum(activations))


def cast_graph(program: Program, sides: Sides) -> CastGraph:
    """The float32 values of `program`, the bytes that casting each moves, and who reads them."""
    values = {node: _value(program, node, sides) for node in _participants(program, sides)}
    pairs = [(one, node) for node in values for one in _cast_for(node, sides) if one in values]
    readings = [
        Reading(operand.name, node.name, keeps=_follows(node, sides) and _rank(operand) > 0)
        for operand, node in pairs
    ]
    high = sure_high(tuple(values.values()), readings)
    wide = (
        replace(reading, widens=operand in _widened(node, sides, high))
        for reading, (operand, node) in zip(readings, pairs, strict=True)
    )
    return CastGraph(tuple(values.values()), tuple(wide))


def _participants(program: Program, sides: Sides) -> list[fx.Node]:
    """The operations with a side, the inputs and state that are float32, and the output."""
    return [
        node
        for node in program.graph.nodes
        if node in sides.of
        or node.op == "output"
        or (node.op in ("placeholder", "get_attr") and _is_float32(node))
    ]


def _value(program: Program, node: fx.Node, sides: Sides) -> Value:
    found = sides.of.get(node)
    if found is None:
        return Value(node.name, "high", 0 if program.is_constant(node) else _cast_bytes(node))
    # What copies a constant would round it where nothing else does, since that costs no cast.
    moves = found.exact and not any(map(program.is_constant, _operands(node)))
    return Value(node.name, found.side, _cast_bytes(node), moves)


def _cast_for(node: fx.Node, sides: Sides) -> list[fx.Node]:
    found = sides.of.get(node)
    return _read_in_half(node, found, mask=True) if found else _operands(node)


def _follows(node: fx.Node, sides: Sides) -> bool:
    """Whether `node` stays high where an operand is."""
    found = sides.of.get(node)
    return found is not None and found.side == "either" and not found.exact


def _widened(node: fx.Node, sides: Sides, high: Collection[str]) -> list[fx.Node]:
    """The operands that `node`, when it is high, takes in half as they are.

    All of them beside one that is surely float32. Else all but one: where every operand is low one
    must be cast. It is one that no product has made, if there is such, which may be high as well.
    """
    found = sides.of.get(node)
    operands = [operand for operand in _operands(node) if _rank(operand) > 0]
    if found is None or not found.widens or len(operands) < 2:
        return []
    sure = [operand for operand in operands if operand.name in high]
    cast = next((one for one in operands if not _is_made_by_product(one, sides)), operands[0])
    return [one for one in operands if sure != [one] if sure or one is not cast]


def _is_made_by_product(value: fx.Node, sides: Sides) -> bool:
    """Whether `value` is a low node's, passed on by operators of one float32 operand each."""
    while True:
        found = sides.of.get(value)
        operands = _operands(value)
        if found is None or found.side != "either" or len(operands) != 1:
            return found is not None and found.side == "low"
        value = operands[0]


def _side(node: fx.Node, policy: Policy, everything: bool) -> OperatorPrecision:
    found = operator_precision(node)
    if found.always:
        return found
    wanted: Side | None = "low" if everything and found is not UNLISTED else None
    reason = "mode='half'"
    for glob, side in policy:
        if matches(glob, node):
            wanted, reason = side, f"policy: {glob} is {side}"
    if wanted is None or wanted == found.side:
        return found
    if wanted != "high" and node.target is not operator.getitem and not can_be_half(node):
        return found
    return replace(found, side=wanted, reason=reason)


def matches(glob: str, node: fx.Node) -> bool:
    """Whether `glob` means `node`: by its module path, `aten.add.Tensor` or `aten.add`."""
    overload = str(node.target)
    names = (module_path(node), overload, overload.rpartition(".")[0])
    return any(fnmatchcase(name, glob) for name in names)


def _in_half(node: fx.Node, dtype: torch.dtype) -> Callable[..., Any]:
    """The operation on operands in `dtype`, as a function of its arguments' values."""
    limits, target = torch.finfo(dtype), node.target

    def halved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        return value.clamp(limits.min, limits.max).to(dtype)

    def widened(value: Any) -> Any:
        is_half = isinstance(value, Tensor) and value.dtype == dtype
        return value.to(torch.float32) if is_half else value

    def compute(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(halved, (args, kwargs))
        return pytree.tree_map(widened, target(*args, **kwargs))  # type: ignore[operator]

    return compute


def _read_in_half(node: fx.Node, found: OperatorPrecision, mask: bool = False) -> list[fx.Node]:
    """The float32 operands that `node` reads in half when it is low, attention's mask or not."""
    operands = _operands(node)
    if found.halved is not None:
        operands = [one for one in operands if one in [node.args[i] for i in found.halved]]
    target: Any = node.target
    index = _MASK.get(target)
    if mask or index is None or len(node.args) <= index:
        return operands
    return [one for one in operands if one is not node.args[index]]


def _operands(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if _is_float32(operand)]


def _float32_tensors(node: fx.Node) -> list[Tensor]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [one for one in leaves if isinstance(one, Tensor) and one.dtype == torch.float32]


def _is_float32(node: fx.Node) -> bool:
    return bool(_float32_tensors(node))


def _rank(node: fx.Node) -> int:
    return max(tensor.ndim for tensor in _float32_tensors(node))


def _cast_bytes(node: fx.Node) -> int:
    """Bytes that a cast of the node's float32 values reads and writes."""
    if node.op == "output":
        return 0
    sizes = (math.prod(map(size_at_capture, one.shape)) for one in _float32_tensors(node))
    return 6 * sum(sizes)
