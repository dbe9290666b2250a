"""A model under measurement, whatever it is: one call of it, its device, its size and its work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt.calls import Inputs, check_inputs, spread
from fxopt.capture import capture
from fxopt.errors import MeasureError
from fxopt.measurement.counters import Unmeasured
from fxopt.measurement.counting import Work, count_work
from fxopt.measurement.outputs import call
from fxopt.optimized import Optimized
from fxopt.program import Program
from fxopt.recipe import materialize

_RESIDENT = Path("/proc/self/statm")


@dataclass(frozen=True)
class Subject:
    """A model with the inputs of one call; `given_tokens` is how many tokens that takes, where the
    caller told."""

    model: Any
    inputs: Inputs
    given_tokens: int | None = None

    @staticmethod
    def of(model: Any, inputs: Inputs, name: str, tokens: int | None = None) -> Subject:
        """`labels` among the inputs are left out.

        Raises `MeasureError` for a model that can't be called, or another container of inputs.
        """
        if not callable(model):
            raise MeasureError(
                f"{name} is a {type(model).__name__}, which can't be called; give an nn.Module, an "
                "fxopt.Optimized or a callable that takes the inputs"
            )
        check_inputs(inputs, "inputs", MeasureError)
        if isinstance(inputs, Mapping):
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        return Subject(model, inputs, tokens)

    def __call__(self) -> Any:
        return call(self.model, self.inputs)

    @property
    def device(self) -> torch.device:
        """That of the first tensor among the inputs, else of the parameters; else the CPU."""
        tensors = [*self._tensors(), *_state(self.model)]
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def rows(self) -> int | None:
        """The first axis of the first tensor of the inputs."""
        return next((t.shape[0] for t in self._tensors() if t.dim()), None)

    @property
    def tokens(self) -> int | None:
        """The given number; else how many places a 2-D attention mask among the inputs shows."""
        if self.given_tokens is not None:
            return self.given_tokens
        mask = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return int((mask != 0).sum())

    def parameter_bytes(self) -> int | Unmeasured:
        """Bytes of parameters and buffers, tied ones once."""
        if isinstance(self.model, Optimized):
            return _of_programs(self.model.programs)
        if not isinstance(self.model, nn.Module):
            return Unmeasured("a plain callable doesn't show its parameters")
        unique = {_place(leaf): leaf for tensor in _state(self.model) for leaf in _leaves(tensor)}
        return sum(leaf.numel() * leaf.dtype.itemsize for leaf in unique.values())

    def work(self) -> tuple[tuple[Work, ...], Mapping[str, str]] | Unmeasured:
        """The work of a call, and the class of each module by its path."""
        # torch.compile wraps the model that can be captured.
        model = getattr(self.model, "_orig_mod", self.model)
        if not isinstance(model, nn.Module):
            return Unmeasured(
                "work is counted on a graph, and a plain callable has none; give the nn.Module"
            )
        try:
            # One that generates answers a call with a step.
            inputs = getattr(model, "step_inputs", lambda given: given)(self.inputs)
            program: Program = (
                model.program_for(inputs)
                if isinstance(model, Optimized)
                else capture(model, inputs)
            )
            work = count_work(program, program.signature.flatten(*spread(inputs)))
        except (
            Exception
        ) as error:  # a peer's module may fail in any way, and was measured all right
            reason = (str(error).splitlines() or [""])[0]
            return Unmeasured(f"the graph can't be counted: {type(error).__name__}: {reason}")
        return work, program.module_types

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_bytes(self) -> int | None:
        """What torch holds on the CUDA device; None elsewhere."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.memory_allocated(self.device))

    def _tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(spread(self.inputs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def resident_bytes() -> int | Unmeasured:
    """Resident memory of this process."""
    try:
        pages = int(_RESIDENT.read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return Unmeasured("this system has no /proc/self/statm")


def _state(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass, such as a quantized weight of torchao, holds."""
    names = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        yield tensor
        return
    for name in names()[0]:
        yield from _leaves(getattr(tensor, name))


def _of_programs(programs: Sequence[Program]) -> int:
    """Bytes of the state of all programs, what several hold once."""
    if len(programs) == 1:
        return programs[0].parameter_bytes()
    held = (materialize(tensor) for program in programs for tensor in program.state.values())
    unique = {_place(tensor): tensor for tensor in held}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in unique.values())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        start = 0
    return (tensor.device, start, tensor.numel()) if start else (id(tensor),)
