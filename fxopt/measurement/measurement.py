"""What one call of a model costs, as a value: a table for people, JSON for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.measurement import text
from fxopt.measurement.fields import MeasurementFields
from fxopt.rendering.saved import Document


@dataclass(frozen=True)
class Measurement(MeasurementFields, Document):
    """The cost of one call of a model on one machine. `str(measurement)` is a table.

    `latency` is in milliseconds, its samples in the rounds that all models measured together share;
    `first_call_seconds` the first call of this measurement, which compiles where nothing did
    before; `parameter_bytes` parameters and buffers, tied ones once; `peak_bytes` what a call needs
    beyond what was held before it, counted by `peak_source`; `resident_bytes` the resident memory
    of the whole process, its libraries and other models included, `device_bytes` what torch holds
    on the CUDA device, both after the calls.

    `flops` and `bytes_moved` are counted on the graph, operator by operator, as if nothing were
    fused; `layers` sets them against the measured `ceilings` by module. `generation` is what
    writing text costs, where that was asked for.

    None stands where something can't be measured, and `reasons` says why, by field name. Energy is
    an `Energy` or an `Unmeasured` with its reason.
    """

    SCHEMA: ClassVar[str] = "fxopt.measurement"

    def __str__(self) -> str:
        return text.render(self)
