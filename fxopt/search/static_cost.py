"""A lower bound on what a candidate can cost, known before it is compiled.

    latency  >=  margin * sum over products of  2 * multiply-adds / ceiling of their dtype
    memory   >=  bytes of the parameters

The ceilings are this machine's, measured; the margin is for a busy moment while they were. What
isn't a product costs nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxopt.analyses.arithmetic import FLOPS_PER_MULTIPLY_ADD, multiply_adds
from fxopt.measurement.ceilings import ceilings
from fxopt.program import Program
from fxopt.search.objectives import key

_MARGIN = 0.8
# Casts, views and transposes stand between a rounded operand and its product.
_STEPS_BACK = 4


def least_milliseconds(program: Program) -> float | None:
    """The least time of a call at the example's sizes; None on a device without ceilings."""
    device = next((tensor.device for tensor in program.example), torch.device("cpu"))
    limits = ceilings(device)
    if limits is None:
        return None
    nodes = {node.name: node for node in program.graph.nodes}
    work: Counter[str] = Counter()
    for name, count in multiply_adds(program).items():
        work[_computed_in(nodes[name])] += FLOPS_PER_MULTIPLY_ADD * count
    seconds = (
        # A rounded product may end up in floating point, whichever is faster.
        count / max(limits.flops.values())
        if dtype == "int8"
        else limits.product_seconds(count, dtype)
        for dtype, count in work.items()
    )
    return _MARGIN * 1e3 * sum(seconds)


def least_ratios(
    objectives: Sequence[str],
    milliseconds: float | None,
    parameter_bytes: int,
    original: Mapping[str, float],
) -> tuple[float, ...]:
    """The least ratio to the original by objective, 0 where nothing is known."""
    least = {key("latency"): milliseconds or 0.0, key("memory"): float(parameter_bytes)}
    names = [key(objective) for objective in objectives]
    return tuple(
        least[name] / original[name] if name in least and original.get(name, 0.0) > 0 else 0.0
        for name in names
    )


def _computed_in(node: fx.Node) -> str:
    """The dtype of a product; int8 where an operand was rounded, even if the other wasn't."""
    frontier = list(node.all_input_nodes)
    for _ in range(_STEPS_BACK):
        if any(str(operand.target).startswith("fxopt.") for operand in frontier):
            return "int8"
        frontier = [one for operand in frontier for one in operand.all_input_nodes[:1]]
    return str(node.meta["val"].dtype).removeprefix("torch.")
