"""What one call of a model costs, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxopt.measurement.ceilings import Ceilings
from fxopt.measurement.counters import Unmeasured
from fxopt.measurement.energy import Energy
from fxopt.measurement.generation import Generation
from fxopt.measurement.roofline import Layer
from fxopt.timing import Latency


@dataclass(frozen=True)
class Throughput:
    """What goes through in a second at the median latency; None where the inputs don't tell.

    A row is an entry of the first axis of the first tensor; tokens are those given, or those that
    the attention mask shows.
    """

    calls: float
    rows: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class MeasurementFields:
    """The fields of a `Measurement`, which says what they are: all that writing it down needs."""

    name: str
    device: str
    latency: Latency
    first_call_seconds: float
    throughput: Throughput
    energy: Energy | Unmeasured
    parameter_bytes: int | None = None
    peak_bytes: int | None = None
    peak_source: str | None = None
    resident_bytes: int | None = None
    device_bytes: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None
    ceilings: Ceilings | None = None
    layers: tuple[Layer, ...] = ()
    generation: Generation | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, str | int | float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("reasons", "fingerprint"):
            object.__setattr__(self, name, dict(getattr(self, name)))

    @property
    def bound_ms(self) -> float | None:
        """The least milliseconds of an unfused call under the ceilings; None without a roofline."""
        return sum(layer.seconds for layer in self.layers) * 1e3 if self.layers else None

    @property
    def share_of_bound(self) -> float | None:
        """`bound_ms` over the median latency: 0.63 runs at 63 % of its unfused bound.

        Above 1 the run moved fewer bytes than the bound counts: operators were fused, or values
        stayed in a cache.
        """
        return None if self.bound_ms is None else self.bound_ms / self.latency.median
