"""In which precision a run computes, and whether its loss is scaled.

A captured student says so by its graph: its passes placed the casts. A plain one runs under
torch.autocast. Gradients of float16 underflow below 6e-8, so that its loss is scaled up and the
gradients down again (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fxopt.device import Device
from fxopt.errors import TrainError
from fxopt.optimized import Optimized

PrecisionName = Literal["full", "mixed", "auto"]


@dataclass(frozen=True)
class Precision:
    """`autocast` is the dtype of torch.autocast on `device_type`, None without it."""

    device_type: str
    autocast: torch.dtype | None
    scaled: bool
    reason: str

    def around(self, model: nn.Module) -> AbstractContextManager[object]:
        """What must stand around a forward of `model`."""
        if self.autocast is None or isinstance(model, Optimized):
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast)

    def scaler(self) -> torch.amp.GradScaler:
        """The scaler of the loss; it does nothing unless `scaled`."""
        return torch.amp.GradScaler(self.device_type, enabled=self.scaled)


def choose_precision(name: PrecisionName, student: nn.Module, device: torch.device) -> Precision:
    """What "full", "mixed" or "auto" means for `student` on `device`.

    Raises `TrainError` for "mixed" on a captured student, which has its own casts, or on a device
    without fast half precision, and for parameters to be trained in float16.
    """
    if any(p.dtype is torch.float16 and p.requires_grad for p in student.parameters()):
        raise TrainError(
            "the student has float16 parameters to train, whose updates round to nothing. Train it "
            "in float32 with precision='mixed', or under the pass Autocast"
        )
    if isinstance(student, Optimized):
        if name == "mixed":
            raise TrainError(
                "precision='mixed' is for a plain module; a captured student computes in what its "
                "passes chose. Add 'autocast{mode=mixed}' to them, and leave precision out"
            )
        scaled = _computes_in_float16(student)
        return Precision(device.type, None, scaled, "as the student's passes placed the casts")
    if name == "full":
        return Precision(device.type, None, False, "full precision was asked for")
    half = Device.describe(device).half()
    if half.dtype is None and name == "mixed":
        raise TrainError(
            f"precision='mixed' gains nothing here: {half.reason}. Use precision='full'"
        )
    return Precision(device.type, half.dtype, half.dtype is torch.float16, half.reason)


def _computes_in_float16(student: Optimized) -> bool:
    values = (node.meta.get("val") for node in student.program.graph.nodes)
    return any(isinstance(value, Tensor) and value.dtype is torch.float16 for value in values)
