"""State and example tensors in one safetensors file; layout kept, shared tensors stored once.

The file holds plain contiguous tensors under their state_dict names, so that any reader of
safetensors can use it; how each was laid out, and whether it is a parameter, is in the graph file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxopt.errors import SaveError
from fxopt.saving.values import field, read_device, read_dtype

EXAMPLE = "example::"
_Key = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], torch.device]


def write_tensors(
    path: Path, state: Mapping[str, Tensor], example: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Write all tensors to `path`; returns {name: entry} for the graph file."""
    named = {**state, **{f"{EXAMPLE}{i}": tensor for i, tensor in enumerate(example)}}
    if len(named) != len(state) + len(example):
        raise SaveError(f"a tensor of the model is named {EXAMPLE}..., which is reserved")
    entries: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    keys: dict[_Key, str] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        _check_plain(name, tensor)
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        kept = keys.setdefault(key, name) if tensor.numel() else name
        order = _order(tensor)
        entries[name] = _entry(tensor, kept, order)
        if kept == name:
            stored[name] = _contiguous(tensor, order, storages)
    try:
        save_file(stored, path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SaveError(f"the tensors can't be written: {error}") from error
    return entries


def read_tensors(
    path: Path, entries: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(state, example) of the file at `path`; every entry is checked for shape and dtype."""
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise SaveError(f"{path.name} can't be read: {error}") from error
    loaded: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, entry in entries.items():
        kept: str = field(entry, "stored", str)
        if kept not in loaded:
            loaded[kept] = _restore(name, stored.pop(kept, None), entry)
        result[name] = loaded[kept]
        _check_entry(name, result[name], entry)
    count = sum(name.startswith(EXAMPLE) for name in result)
    try:
        example = tuple(result.pop(f"{EXAMPLE}{index}") for index in range(count))
    except KeyError as error:
        raise SaveError(f"the example tensor {error} is missing") from error
    return result, example


def _entry(tensor: Tensor, kept: str, order: list[int] | None) -> dict[str, Any]:
    return {
        "stored": kept,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "order": order,
        "device": str(tensor.device),
        "parameter": isinstance(tensor, nn.Parameter),
        "requires_grad": tensor.requires_grad,
    }


def _check_plain(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        fault = f"a {type(tensor).__name__}"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        fault = f"a tensor of layout {tensor.layout}"
    elif tensor.is_meta:
        fault = "on the meta device, without values"
    else:
        return
    raise SaveError(
        f"{name} is {fault}, and only plain dense tensors can be saved. Save before the step that "
        "made it, and run that step again after loading."
    )


def _order(tensor: Tensor) -> list[int] | None:
    """The permutation that makes a dense tensor contiguous; None where it is or can't be."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
    return order if tensor.permute(order).is_contiguous() else None


def _contiguous(tensor: Tensor, order: list[int] | None, storages: set[int]) -> Tensor:
    """A contiguous copy on the CPU, without a copy where the tensor is one already."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    plain = (plain if order is None else plain.permute(order)).contiguous()
    storage = plain.untyped_storage()
    # safetensors writes whole storages and refuses shared ones.
    if storage.nbytes() != plain.numel() * plain.itemsize or storage.data_ptr() in storages:
        plain = plain.clone()
    storages.add(plain.untyped_storage().data_ptr())
    return plain


def _restore(name: str, tensor: Tensor | None, entry: Any) -> Tensor:
    if tensor is None:
        raise SaveError(f"the tensor {name!r:.80} is missing from the tensor file")
    order = entry.get("order")
    device = read_device(field(entry, "device", str))
    # A copy of its own: the file may be replaced, and its tensors are aligned to 8 bytes only.
    value = tensor.clone().to(device)
    if order is not None:
        if sorted(order) != list(range(value.ndim)):
            raise SaveError(f"the tensor {name!r:.80} has the impossible layout {order!r:.40}")
        value = value.permute([order.index(axis) for axis in range(value.ndim)])
    requires_grad: bool = field(entry, "requires_grad", bool)
    if requires_grad and not (value.is_floating_point() or value.is_complex()):
        raise SaveError(f"the tensor {name!r:.80} of {value.dtype} can't be trained")
    if field(entry, "parameter", bool):
        return nn.Parameter(value, requires_grad)
    return value.requires_grad_(requires_grad)


def _check_entry(name: str, tensor: Tensor, entry: Any) -> None:
    dtype, shape = read_dtype(field(entry, "dtype", str)), field(entry, "shape", list)
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise SaveError(
            f"the tensor {name!r:.80} is {tensor.dtype}{list(tensor.shape)} in the tensor file, "
            f"and the graph file expects {dtype}{shape}"
        )
