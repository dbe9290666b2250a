"""What passes chose for the weights of a model, so that all of its programs choose the same.

A model that generates has a program that reads many tokens and one that reads one, made one after
the other. Calibration gives each other inputs, or fits only one of them; a weight that both read
must be rounded once all the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor

from fxopt.tensor_digest import tensor_digest


class Choices:
    """Choices by what they are for, and by the values that they were made for."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[bytes, Any]] = {}

    def known(self, key: Hashable, values: Iterable[Tensor]) -> Any:
        """What was chosen under `key`, where it was for equal `values`; else None."""
        found = self._made.get(key)
        return found[1] if found is not None and found[0] == tensor_digest(values) else None

    def note(self, key: Hashable, values: Iterable[Tensor], chosen: Any) -> None:
        """Have `known` give `chosen` from now on."""
        self._made[key] = (tensor_digest(values), chosen)
