"""A transformation gives the same result whatever modes its caller is in.

autocast        off: precision is placed by a pass, and the model's own is what it computes
inference mode  off, gradients on: what is made inside can be trained and written to
default device  the CPU, but where the model itself runs: there it is part of what forward means
default dtype   the caller's, for the same reason; the house names dtypes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
_callers_device: ContextVar[torch.device | None] = ContextVar("callers_device", default=None)


@contextmanager
def callers_modes_off() -> Iterator[None]:
    """No autocast, inference mode or default device inside the block, and gradients enabled."""
    device = torch.get_default_device()
    with ExitStack() as stack:
        if device.type != "cpu":
            token = _callers_device.set(device)
            stack.callback(_callers_device.reset, token)
            stack.enter_context(torch.device("cpu"))
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def callers_device() -> Iterator[None]:
    """The caller's default device inside the block: a forward may make tensors that name none."""
    device = _callers_device.get()
    with nullcontext() if device is None else device:
        yield
