"""The floor of an int8 BERT: its matrix products alone, called on oneDNN with nothing between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

_SCALE, _ZERO_POINT = 0.02, 128


@dataclass(frozen=True)
class Product:
    """One linear layer: its sizes in multiples of the hidden size `d` and of the inner size `f`,
    the dtype of its result, and oneDNN's post-operation."""

    inputs: str
    outputs: str
    dtype: torch.dtype
    post_op: tuple[str, str] = ("none", "")


LAYER: tuple[Product, ...] = (
    Product("d", "3d", torch.bfloat16),  # q, k and v, for an attention in bfloat16
    Product("d", "d", torch.float32),  # added to the float32 residual stream
    Product("d", "f", torch.uint8, ("gelu", "none")),  # read by the next product as it is
    Product("f", "d", torch.float32),
)
"""The four products of a layer, as the static list of passes leaves them."""


def int8_products(model: nn.Module, rows: int) -> Callable[[], None]:
    """Runs all products of a BERT on `rows` tokens: uint8 activations, int8 weights laid out once.

    The weights are random and as many as the model's, so that they take as much room in the caches.
    """
    config = model.config
    sizes = {"d": config.hidden_size, "3d": 3 * config.hidden_size, "f": config.intermediate_size}
    x = {size: torch.randint(0, 255, (rows, sizes[size]), dtype=torch.uint8) for size in ("d", "f")}
    calls = [
        _call(product, x[product.inputs], sizes[product.outputs])
        for _ in range(config.num_hidden_layers)
        for product in LAYER
    ]

    def run() -> None:
        for call in calls:
            call()

    return run


def _call(product: Product, x: torch.Tensor, outputs: int) -> Callable[[], object]:
    weight = torch.randint(-127, 128, (outputs, x.shape[1]), dtype=torch.int8)
    attribute, algorithm = product.post_op
    is_int8 = product.dtype == torch.uint8
    return partial(
        torch.ops.onednn.qlinear_pointwise,
        x,
        _SCALE,
        _ZERO_POINT,
        torch.ops.onednn.qlinear_prepack(weight, None),
        torch.full((outputs,), 1e-3),
        torch.zeros(outputs, dtype=torch.int32),
        torch.zeros(outputs),
        _SCALE if is_int8 else 1.0,
        _ZERO_POINT if is_int8 else 0,
        product.dtype,
        attribute,
        [],
        algorithm,
    )
