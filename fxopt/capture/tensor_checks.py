"""What a parameter or buffer must be: a plain, dense tensor with values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxopt.errors import ModelError

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def check_tensors(model: nn.Module) -> None:
    """Raise `ModelError` for a parameter or buffer of `model` that no pass could read."""
    for name, tensor in _tensors(model):
        fault = _fault(tensor)
        if fault is not None:
            raise ModelError(f"{name} {fault}")
        if (tensor.is_floating_point() or tensor.is_complex()) and _has_nan(tensor):
            raise ModelError(
                f"{name} holds {int(tensor.isnan().sum())} NaN of {tensor.numel()} entries; no "
                "claim can be judged on such a model. Reload or repair the weights."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fault(tensor: Tensor) -> str | None:
    """What is wrong with a tensor, and the way out; None where nothing is."""
    if is_lazy(tensor):
        return (
            "has no shape yet: the model has lazy modules that never ran. Call the model once on "
            "real inputs, then transform it."
        )
    if tensor.is_meta:
        return (
            "is on the meta device, so the model has no values to optimise. Load its weights first "
            "(model.to_empty(device='cpu') and load_state_dict, or from_pretrained)."
        )
    if tensor.is_inference():
        return (
            "is an inference tensor: the model was built or loaded under torch.inference_mode(), "
            "and such tensors can't be captured. Transform copy.deepcopy(model), made outside of "
            "inference mode."
        )
    if tensor.is_quantized:
        return (
            f"is a quantized tensor ({tensor.dtype}), which passes can't read. Transform the float "
            "model and let a pass quantize it (fxopt.Int8Linear), or replace the tensor by "
            "its dequantize()."
        )
    if type(tensor) not in _PLAIN and _dispatches(tensor):
        return _subclass_fault(tensor)
    if tensor.layout is not torch.strided:
        return (
            f"has the layout {tensor.layout}, and passes read dense weights alone. Replace it by "
            "its to_dense()."
        )
    return None


def _subclass_fault(tensor: Tensor) -> str:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if hasattr(tensor, "full_tensor"):
        return f"is sharded ({kind}). Transform a model that holds its full_tensor()."
    way = (
        "replace the parameter by nn.Parameter(weight.dequantize(), requires_grad=False)"
        if type(tensor).dequantize is not Tensor.dequantize
        else "replace it by a plain tensor of the same values"
    )
    return (
        f"is a {kind}, a tensor with operators of its own, which passes can't read. Transform the "
        "model before it is quantized (fxopt.Int8Linear quantizes it, and its claim is judged), "
        f"or {way}."
    )


def _dispatches(tensor: Tensor) -> bool:
    """Whether a tensor computes in its own way: a subclass by name alone is plain."""
    kind: Any = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    # nn.Parameter's is a built-in that does nothing.
    function = getattr(kind.__torch_function__, "__func__", None)
    return function not in (None, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]


def _has_nan(tensor: Tensor) -> bool:
    # The sum is one pass and NaN whenever an entry is; only a suspect pays for the exact look.
    tensor = tensor.detach()
    if tensor.dtype.itemsize == 1:  # aten sums no float8
        return bool(tensor.float().isnan().any())
    return not bool(tensor.sum().isfinite()) and bool(tensor.isnan().any())
