"""What a model must be before it is captured; each refusal says what to do, nothing is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from fxopt.errors import ModelError
from fxopt.program import Mode


def check_model(model: object) -> None:
    """Raise `ModelError` unless `model` is an nn.Module that a graph can stand for.

    Refused: what is no module, parameters on the meta device or holding NaN, and hooks, which a
    graph can't call. The hooks of `torch.nn.utils` (pruning masks, weight norm) compute weights;
    they are traced into the graph.
    """
    check_is_module(model)
    assert isinstance(model, nn.Module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                f"{name} is on the meta device, so the model has no values to optimise. Load its "
                "weights first (model.to_empty(device='cpu') and load_state_dict, or "
                "from_pretrained)."
            )
        if tensor.is_floating_point() and _has_nan(tensor):
            raise ModelError(
                f"{name} holds {int(tensor.isnan().sum())} NaN of {tensor.numel()} entries; no "
                "claim can be judged on such a model. Reload or repair the weights."
            )
    for name in (*model._modules, *model._parameters, *model._buffers):
        if hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name):
            raise ModelError(
                f"{type(model).__name__} has a part named {name!r}, a name that torch.fx keeps for "
                "itself. Rename it, or wrap the model in another nn.Module."
            )
    for path, module in model.named_modules():
        _check_hooks(path or type(model).__name__, module)


def check_is_module(model: object) -> None:
    """Raise `ModelError` unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        if inspect.isclass(model) and issubclass(model, nn.Module):
            hint = f"you passed the class {model.__name__}; create an instance of it first"
        elif callable(model):
            hint = "wrap the function in an nn.Module whose forward calls it"
        else:
            hint = "pass the loaded model itself"
        raise ModelError(f"transform needs an nn.Module, not {type(model).__name__}: {hint}.")


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """`model` in `mode` inside the block; each of its modules restored to its own flag after it.

    A model that is training already stays as it is: what its user has put in eval mode, such as a
    frozen batch norm, stays in it. One in eval mode is put in train mode by its own `train`.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if mode == "eval":
            for module, _ in flags:
                module.training = False
        elif not model.training:
            model.train()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _has_nan(tensor: torch.Tensor) -> bool:
    # The sum is one pass and NaN whenever an entry is; only a suspect pays for the exact look.
    total = tensor.detach().sum()
    return not bool(total.isfinite()) and bool(tensor.isnan().any())


def _check_hooks(path: str, module: nn.Module) -> None:
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    for table in tables:
        for hook in getattr(module, table).values():
            owner = type(hook).__module__ if not inspect.isfunction(hook) else hook.__module__
            if not str(owner).startswith("torch.nn.utils"):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise ModelError(
                    f"module {path} has a hook ({name}); a captured graph can't call it. Remove it "
                    "(handle.remove()) or move its work into forward, then transform again."
                )
