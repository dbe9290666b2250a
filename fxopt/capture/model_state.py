"""The tensors of a model by their names: tied ones, those of a path, those that aren't saved."""

from __future__ import annotations

from torch import Tensor, nn


def tied_names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """(every state name -> first name of its tensor, further name -> first name)."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        canonical[name] = first.setdefault(id(tensor), name)
    return canonical, {name: kept for name, kept in canonical.items() if name != kept}


def lookup(model: nn.Module, target: str) -> Tensor | None:
    """The tensor of the model at a dotted name, if there is one."""
    path, _, name = target.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), name)
    except AttributeError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def non_persistent(model: nn.Module) -> list[str]:
    """The names of buffers that a state_dict leaves out."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    ]
