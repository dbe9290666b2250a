"""A model called with a batch of any kind, and the tensor of its answer that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import spread
from fxopt.errors import MeasureError
from fxopt.train.calling import evaluating

PLAIN = "output"
"""The name of an output that the model doesn't name."""


def call(model: Callable[..., Any], batch: Any) -> Any:
    """`model(**batch)` for a dict, without its `labels`; `model(*batch)` for a tuple or list."""
    args, kwargs = spread(batch)
    kwargs.pop("labels", None)
    return model(*args, **kwargs)


def main_output(outputs: Any, model: str) -> tuple[str, Tensor]:
    """The name and tensor of `logits` where there are any, else of the first floating-point tensor.

    A loss is passed over; numpy arrays count as tensors. Raises `MeasureError` where there is none.
    """
    named = outputs._asdict() if hasattr(outputs, "_asdict") else outputs
    if isinstance(named, Mapping):
        order = sorted(named, key=lambda name: name != "logits")
        candidates = [(str(name), named[name]) for name in order if name != "loss"]
    else:
        candidates = [(PLAIN, named)]
    for name, value in candidates:
        for leaf in pytree.tree_leaves(value):
            tensor = torch.from_numpy(leaf) if isinstance(leaf, numpy.ndarray) else leaf
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return name, tensor
    raise MeasureError(
        f"{model} returned {type(outputs).__name__} without a floating-point tensor, so there is "
        "nothing to compare. Let it return a tensor, a tuple, a dict or a ModelOutput."
    )


def rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """The rows `[rows, features]` of an output, those of padding left out.

    `[rows, features]` and `[batch, length, features]` keep their last axis, of which `mask`
    `[batch, length]` chooses; `[batch]` has one feature; what has more axes, one row an example.
    """
    if output.ndim == 3:
        return output.flatten(0, 1) if mask is None else output[mask]
    return output.reshape(1, 1) if output.ndim == 0 else output.reshape(len(output), -1)


def padding_mask(batch: Any, output: Tensor) -> Tensor | None:
    """The batch's `attention_mask` as booleans, where it is `[batch, length]` of `output`."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or output.ndim != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.to(output.device, torch.bool)


@contextmanager
def judging(models: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """The models that are modules in eval mode, no gradients; each is put back into its mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        yield
