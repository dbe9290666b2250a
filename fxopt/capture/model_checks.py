"""What a model must be before it is captured; each refusal says what to do, nothing is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxopt.capture.tensor_checks import check_tensors
from fxopt.errors import ModelError
from fxopt.program import Mode

_QUANTIZED_BY_AO = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse",
)
_DISTRIBUTED = ("torch.nn.parallel.distributed", "torch.distributed")
_TRACED_HOOKS = ("torch.nn.utils", "transformers.utils.output_capturing", "torch.export")
"""Whose hooks do nothing that a trace doesn't see."""


def check_model(model: object) -> None:
    """Raise `ModelError` unless `model` is an nn.Module that a graph can stand for.

    Refused: what is no module, TorchScript, modules that torch.ao has quantized, wrappers that
    spread a model over devices, tensors without values or of another kind than plain (see
    `check_tensors`), and hooks, which a graph can't call. The hooks of `torch.nn.utils` (pruning
    masks, weight norm) compute weights, those of transformers collect outputs, those of an
    exported program check inputs; they are traced into the graph.
    """
    check_is_module(model)
    assert isinstance(model, nn.Module)
    check_tensors(model)
    for name in (*model._modules, *model._parameters, *model._buffers):
        if hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name):
            raise ModelError(
                f"{type(model).__name__} has a part named {name!r}, a name that torch.fx keeps for "
                "itself. Rename it, or wrap the model in another nn.Module."
            )
    for path, module in model.named_modules():
        _check_hooks(path or type(model).__name__, module)


def check_is_module(model: object) -> None:
    """Raise `ModelError` unless `model` is an nn.Module, written in Python in all its parts."""
    if not isinstance(model, nn.Module):
        if inspect.isclass(model) and issubclass(model, nn.Module):
            hint = f"you passed the class {model.__name__}; create an instance of it first"
        elif isinstance(model, ExportedProgram):
            hint = "pass its .module()"
        elif callable(model):
            hint = "wrap the function in an nn.Module whose forward calls it"
        else:
            hint = "pass the loaded model itself"
        raise ModelError(f"transform needs an nn.Module, not {type(model).__name__}: {hint}.")
    for path, module in model.named_modules():
        _check_kind(path or "the model", module)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been called on `model` or on a part of it."""
    return any(
        _is_wrapper(module) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped; any other as it is."""
    while _is_wrapper(model):
        model = model.get_submodule("_orig_mod")
    return model


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


def _is_wrapper(module: nn.Module) -> bool:
    # By name, since Dynamo takes seconds to import.
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return "torch._dynamo.eval_frame.OptimizedModule" in names


def _check_kind(path: str, module: nn.Module) -> None:
    origin = type(module).__module__
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{path} is TorchScript ({type(module).__name__}, of torch.jit.script or "
            "torch.jit.trace): compiled code, which can't be traced. Transform the Python module "
            "that it was made from."
        )
    if origin.startswith(_QUANTIZED_BY_AO):
        raise ModelError(
            f"{path} is a {origin}.{type(module).__name__}: torch.ao has quantized it and packed "
            "its weight, which passes can't read. Transform the float model; fxopt.Int8Linear "
            "quantizes it."
        )
    parallel = isinstance(module, nn.DataParallel) and module.device_ids
    if parallel or origin.startswith(_DISTRIBUTED):
        raise ModelError(
            f"{path} is a {type(module).__name__}, which spreads a model over devices or "
            "processes. Transform what it wraps (its .module), and wrap the result."
        )


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
            if not str(owner).startswith(_TRACED_HOOKS):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise ModelError(
                    f"module {path} has a hook ({name}); a captured graph can't call it. Remove it "
                    "(handle.remove()) or move its work into forward, then transform again."
                )
