"""What a model costs and what it is worth: time, memory, energy, and how true it is."""

from fxopt.measurement.ceilings import Ceilings, ceilings
from fxopt.measurement.counters import Domain, EnergyCounter, Unmeasured, energy_counter
from fxopt.measurement.energy import Energy, Spread, estimate_energy, measure_energy
from fxopt.measurement.fidelity import Fidelity, fidelity, fidelity_all
from fxopt.measurement.fields import Throughput
from fxopt.measurement.forcing import Decoded
from fxopt.measurement.generation import Decoding, Generation
from fxopt.measurement.measurement import Measurement
from fxopt.measurement.measuring import measure, measure_all
from fxopt.measurement.pair import Pair
from fxopt.measurement.roofline import Layer

__all__ = [
    "Ceilings",
    "Decoded",
    "Decoding",
    "Domain",
    "Energy",
    "EnergyCounter",
    "Fidelity",
    "Generation",
    "Layer",
    "Measurement",
    "Pair",
    "Spread",
    "Throughput",
    "Unmeasured",
    "ceilings",
    "energy_counter",
    "estimate_energy",
    "fidelity",
    "fidelity_all",
    "measure",
    "measure_all",
    "measure_energy",
]
