"""What is said of a model that can't be captured: the construct, its line, what to try instead."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from fxopt.errors import CaptureError

DERIVATIVE_ADVICE = (
    "torch.func.grad, vjp and jvp can't be captured inside forward: write the derivative out, or "
    "take it outside of the model"
)
_ADVICE = (
    (
        ("functorch tensor",),
        DERIVATIVE_ADVICE,
    ),
    (
        ("data-dependent", "DataDependent", "GuardOnDataDependent", "unbacked", ".item()"),
        "the model's control flow or sizes depend on tensor values: express the choice with "
        "torch.where, or bound the value with torch._check",
    ),
    (
        ("pytree", "flatten", "Unsupported output", "output type"),
        "an input or output type isn't registered as a pytree: return tensors, tuples, dicts or "
        "a ModelOutput, or register the type once with torch.export.register_dataclass (a "
        "dataclass) or torch.utils._pytree.register_pytree_node with flatten_with_keys_fn",
    ),
    (
        ("fake tensor", "FakeTensor", "Meta", "meta implementation"),
        "an operator has no fake (meta) implementation: add one with torch.library.register_fake",
    ),
)
_DEFAULT_ADVICE = (
    "call torch.export.export(model, ...) on it alone to see the whole trace, and move what it "
    "points at out of forward"
)


def capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """What `error` means for the capture of `model`."""
    text = f"{type(error).__name__}: {error}"
    advice = next(
        (advice for marks, advice in _ADVICE if any(mark in text for mark in marks)),
        _DEFAULT_ADVICE,
    )
    return CaptureError(
        f"{type(model).__name__} can't be captured as a graph.\n"
        f"  construct: {type(error).__name__}: {first_line(error)}\n"
        f"  at: {user_line(error)}\n"
        f"  try: {advice}"
    )


def first_line(error: BaseException) -> str:
    """What the error says first."""
    return (str(error).strip().splitlines() or ["(no message)"])[0]


def user_line(error: BaseException) -> str:
    """The innermost line of the traceback that isn't torch's own."""
    torch_folder = str(Path(torch.__file__).parent)
    own_folder = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_folder, own_folder, "<"))
    ]
    if not frames:
        return "unknown line"
    last = frames[-1]
    return f"{last.filename}:{last.lineno}  {last.line}"
