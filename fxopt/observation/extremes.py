"""Extremes: how large the values of a program become, and which leave the range of a dtype.

float16 ends at 65504: what is larger becomes infinite. bfloat16 ends where float32 does, nearly: a
mask that holds float32's least number leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx

from fxopt.interpreter import fork_rng
from fxopt.nodes import label
from fxopt.observation.observation import calibration_warnings, observe
from fxopt.observation.observers import MinMax
from fxopt.program import Program


@dataclass(frozen=True)
class Extremes:
    """The largest finite magnitude at each node, and what makes these numbers doubtful."""

    largest: Mapping[fx.Node, float]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest", MappingProxyType(dict(self.largest)))


def extremes(program: Program, nodes: Iterable[fx.Node]) -> Extremes:
    """The largest finite magnitudes of `nodes` over the calibration inputs, or the example.

    `nodes` are of `program.graph`; those that hold no floating-point tensor are left out. The
    inputs are streamed once for all. Infinities and NaN don't count: masks hold the one, and
    queries that see no key make the other. Raises `CalibrationError` for unusable batches.
    """
    asked = [node for node in dict.fromkeys(nodes) if _is_floating_point(node)]
    state = {node: MinMax() for node in asked if node.op == "get_attr"}
    for node, observer in state.items():
        observer.update(program.tensor(str(node.target)))
    computed = {node: MinMax() for node in asked if node not in state}
    warnings: tuple[str, ...] = ()
    if computed:
        with fork_rng():
            watched = {node: (observer,) for node, observer in computed.items()}
            seen = observe(program, watched, refuse_nan=False)
        named = {label(node): (observer,) for node, observer in computed.items()}
        warnings = calibration_warnings(seen, named)
    found = {**state, **computed}
    return Extremes({node: max(-found[node].low, found[node].high) for node in asked}, warnings)


def past_range(found: Extremes, dtype: torch.dtype) -> dict[fx.Node, str]:
    """The nodes whose values leave the finite range of `dtype`, each with that as a sentence."""
    limit, name = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
    return {
        node: f"its values reach {largest:.3g}, past {name}'s largest, {limit:g}"
        for node, largest in found.largest.items()
        if largest > limit
    }


def _is_floating_point(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
