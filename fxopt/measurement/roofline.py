"""The roofline: the least time of each layer under the machine's measured ceilings.

    time of a layer  =  max(operations / ceiling of their dtype,  bytes / bandwidth)
    intensity        =  operations / bytes

A layer is what one module of the model does itself. Its bytes are those of unfused execution (see
`counting`), so that fused or cached execution can be faster than the bound: a share above 100 %
says that it was.
Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fxopt.measurement.ceilings import Ceilings
from fxopt.measurement.counting import Work


@dataclass(frozen=True)
class Layer:
    """One point of the roofline.

    `path` is the module's ("" the model itself), `kind` its class; `flops` and `bytes` are of one
    call; `seconds` is the least time that the ceilings allow, `product_seconds` that of its
    operations alone; `share` the part of the whole bound.
    """

    path: str
    kind: str
    flops: int
    bytes: int
    seconds: float
    product_seconds: float
    share: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def limit(self) -> str:
        """What binds: "compute" or "memory"."""
        return "compute" if self.product_seconds >= self.seconds else "memory"


def roofline(
    work: Iterable[Work], kinds: Mapping[str, str], ceilings: Ceilings
) -> tuple[Layer, ...]:
    """The layers of `work` in the order of their first operator; `kinds` are classes by path."""
    by_path: dict[str, list[Work]] = {}
    for item in work:
        by_path.setdefault(item.path, []).append(item)
    points = [
        (path, items, *_least_times(items, ceilings))
        for path, items in by_path.items()
        if any(item.bytes or item.flops for item in items)
    ]
    total = sum(seconds for *_, seconds in points)
    return tuple(
        Layer(
            path,
            kinds.get(path, ""),
            sum(item.flops for item in items),
            sum(item.bytes for item in items),
            seconds,
            product_seconds,
            seconds / total,
        )
        for path, items, product_seconds, seconds in points
    )


def _least_times(items: Iterable[Work], ceilings: Ceilings) -> tuple[float, float]:
    items = list(items)
    products = math.fsum(ceilings.product_seconds(i.flops, i.dtype) for i in items if i.flops)
    memory = ceilings.memory_seconds(sum(item.bytes for item in items))
    return products, max(products, memory)
