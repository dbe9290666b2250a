"""Models that hold optimised modules: what their passes have marked is known in the whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.capture import capture
from fxopt.nodes import note_origins
from fxopt.optimized import Optimized
from fxopt.program import Mode, Program


def capture_whole(model: nn.Module, inputs: Any, mode: Mode, **options: Any) -> Program:
    """`capture(model, inputs, mode, **options)`, where tensors of optimised modules inside of
    `model` have the origins that they have there."""
    program = capture(model, inputs, mode, **options)
    within = {
        f"{path}.{name}": origins
        for path, module in model.named_modules()
        if isinstance(module, Optimized) and module.is_captured
        for name, origins in module.program.origins.items()
    }
    known = {program.aliases.get(name, name): origins for name, origins in within.items()}
    note_origins(program.graph, known)
    return program
