"""oneDNN on plain weights: whether it is at hand, and a float32 linear layer on it.

aten's float32 linear runs on MKL, which on some CPUs (AMD's) takes twice as long as oneDNN.
Source: oneDNN, "Inner Product".
"""

from __future__ import annotations

import torch
from torch import Tensor

# oneDNN lays a plain weight out anew at each call, which pays from so many rows on.
_MANY_ROWS = 64


def has_onednn() -> bool:
    """Whether torch has oneDNN and may use it."""
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, least_rows: int = _MANY_ROWS
) -> Tensor:
    """x @ Wᵀ + b for `x` `[..., K]`, `weight` `[N, K]` and `bias` `[N]`, without gradients: on
    oneDNN in float32 on the CPU from `least_rows` rows on, else aten's."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    rows = x.numel() // max(1, x.shape[-1])
    if not (on_cpu and rows >= max(1, least_rows) and weight.numel() and has_onednn()):
        return torch.nn.functional.linear(x, weight, bias)
    # oneDNN takes a bias of unit stride only and reads a wrong one past its end.
    bias = None if bias is None else bias.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return y
