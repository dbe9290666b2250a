"""The type of a power of matrices without its products.

    A^n, n > 2, has the type of A^3, and A^-n that of A^-3: the last of its products makes it

torch itself finds the type by as many products as the exponent has binary digits, at most twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 3


def type_of_matrix_power(x: Tensor, n: int) -> Tensor:
    """The fake value of `aten.linalg_matrix_power.default` for x [..., K, K] and any exponent."""
    power: Tensor = torch.linalg.matrix_power(x, max(-_LARGEST, min(n, _LARGEST)))
    return power
