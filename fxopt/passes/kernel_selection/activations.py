"""The activations that a product can end with, as the kernels name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.rewriting import arguments

aten = torch.ops.aten

ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
}


def activation_name(node: fx.Node) -> str:
    """The post-operation that an activation's call is: gelu, gelu_tanh, relu or silu."""
    name = ACTIVATIONS[node.target]
    tanh = name == "gelu" and arguments(node)["approximate"] == "tanh"
    return "gelu_tanh" if tanh else name
