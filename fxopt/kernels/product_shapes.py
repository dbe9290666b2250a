"""What every operator that multiplies rows by a weight asks of their shapes."""

from __future__ import annotations

from torch import Tensor

from fxopt.errors import KernelError


def check_product(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise `KernelError` unless `x` is `[..., K]` and `weight` `[N, K]`; `name` is the
    operator's."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"{name} needs [..., K] and a weight [N, K], not {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        )
