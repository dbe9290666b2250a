"""What calibration sees at the inputs of weights: one observer for all that meet a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import fx

from fxopt.nodes import label
from fxopt.observation import Observer, SecondMoment, calibration_warnings, observe
from fxopt.operators import Linear
from fxopt.passes.quantization.quantize_linear import WeightKey, weight_key
from fxopt.program import Program

Seen = TypeVar("Seen", bound=Observer)

_MOST_BYTES = 1 << 30
"""Observers held at once; inputs beyond it are learnt in another pass over calibration."""


def watch_inputs(
    program: Program,
    linears: Sequence[Linear],
    make: Callable[[], Seen],
    bytes_of: Callable[[int], int],
    warnings: dict[str, None],
) -> Iterator[tuple[list[Linear], Seen]]:
    """Layers, one for each weight, with the observer that saw all inputs of that weight.

    Layers of one input share an observer; a weight that meets several inputs has one for all of
    them. `make` makes one, which holds `bytes_of(K)` bytes for K channels; what makes calibration
    doubtful is added to `warnings`.
    """
    for wave in _waves(linears, bytes_of):
        observers = {inputs: make() for inputs in wave}
        watched: dict[fx.Node, list[Observer]] = {}
        for inputs, observer in observers.items():
            for x in inputs:
                watched.setdefault(x, []).append(observer)
        seen = observe(program, watched)
        named = {label(wave[inputs][0].node): [one] for inputs, one in observers.items()}
        warnings.update(dict.fromkeys(calibration_warnings(seen, named)))
        for inputs, observer in observers.items():
            yield wave[inputs], observer


def watch_moments(
    program: Program, linears: Sequence[Linear], warnings: dict[str, None], plain: str, without: str
) -> Iterator[tuple[list[Linear], SecondMoment]]:
    """`watch_inputs` of second moments, to which weights are fitted with error feedback.

    Warns where there are fewer rows than channels: what was fitted may be worse than `plain`,
    which the option `without` gives.
    """
    for layers, moment in watch_inputs(program, linears, SecondMoment, _moment_bytes, warnings):
        inner = layers[0].in_features
        if moment.rows < inner:
            names = ", ".join(label(linear.node) for linear in layers)
            warnings[
                f"the weight of {names} was fitted to {moment.rows} rows of {inner} channels, and "
                f"can be worse than {plain} on others: give calibration= more inputs, or {without}"
            ] = None
        yield layers, moment


def _moment_bytes(channels: int) -> int:
    return 4 * channels**2


def _waves(
    linears: Sequence[Linear], bytes_of: Callable[[int], int]
) -> list[dict[tuple[fx.Node, ...], list[Linear]]]:
    """Layers, one for each weight, by the inputs that meet it; cut where too much is held."""
    met: dict[WeightKey, dict[fx.Node, Linear]] = {}
    for linear in linears:
        met.setdefault(weight_key(linear), {})[linear.x] = linear
    together: dict[tuple[fx.Node, ...], list[Linear]] = {}
    for by_input in met.values():
        together.setdefault(tuple(by_input), []).append(next(iter(by_input.values())))
    waves: list[dict[tuple[fx.Node, ...], list[Linear]]] = []
    held = _MOST_BYTES
    for inputs, layers in together.items():
        size = bytes_of(layers[0].in_features)
        if held + size > _MOST_BYTES:
            waves.append({})
            held = 0
        waves[-1][inputs] = layers
        held += size
    return waves
