"""How a batch becomes a call, the same for student and teacher."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import bind, forward_signature, spread
from fxopt.errors import InputError
from fxopt.optimized import Optimized
from fxopt.train.labels import labels_of, range_text


def call(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)` for a dict, `model(*batch)` for a tuple or list, `model(batch)` else.

    The entry `labels` of a dict is left out where the model has no such argument. Raises
    `InputError` for labels that the model has no class for.
    """
    args, given = spread(batch)
    if "labels" in given and not _takes_labels(model):
        del given["labels"]
    try:
        return model(*args, **given)
    except IndexError as error:
        labels = labels_of(given)
        if labels is None or "arget" not in str(error):
            raise
        raise InputError(
            f"a batch of data= has {range_text(labels)}, and {type(model).__name__} has no class "
            f"for one of them ({error}). Labels count from 0 on; -100 doesn't count."
        ) from error


def named_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The batch as {argument name: value}; positional ones are named by `model.forward`."""
    args, given = spread(batch)
    try:
        return bind(forward_signature(model), args, {}) if args else given
    except InputError:
        return {}  # the call itself says what is wrong


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; a mapping becomes a dict."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map_only(Tensor, lambda one: one.to(device, non_blocking=True), batch)


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer is; None for a model without any."""
    tensors = (tensor for each in (model.parameters(), model.buffers()) for tensor in each)
    return next((tensor.device for tensor in tensors), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and no gradients; each of its parts is put back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        put_back(modes)


def put_back(modes: Mapping[nn.Module, bool]) -> None:
    """Each module into the mode that it had."""
    for module, training in modes.items():
        module.training = training


def _takes_labels(model: nn.Module) -> bool:
    if isinstance(model, Optimized) and model.is_captured:
        return "labels" in model.program.signature.names
    parameters = forward_signature(model).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "labels" in parameters or inspect.Parameter.VAR_KEYWORD in kinds
