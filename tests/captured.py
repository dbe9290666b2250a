"""The architectures and their captures, made once a process; programs are frozen, so tests share.

A test that writes to a model or to a program makes its own, with `ARCHITECTURES[name]()`; that no
test has written to a shared one is asserted when the tests end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.program import Program
from tests.architectures import ARCHITECTURES, Case

_CASES: dict[tuple[int, int], str] = {}
_SEEN: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}


@functools.cache
def case(name: str) -> Case:
    """The model of that name with its inputs."""
    # Making one seeds the global generator, which is the test's own.
    with torch.random.fork_rng(devices=[]):
        made = ARCHITECTURES[name]()
    _CASES[id(made.model), id(made.example)] = name
    return made


@functools.cache
def captured(name: str) -> Program:
    """The capture of `case(name)` on its example."""
    shared = case(name)
    program = capture(shared.model, shared.example)
    state = {key: tensor.clone() for key, tensor in shared.model.state_dict().items()}
    _SEEN[name] = (str(program.graph), state)
    return program


@functools.cache
def canonicalized(name: str) -> fxopt.Optimized:
    """`case(name)` after `Canonicalize`, to be transformed further without a capture."""
    shared = case(name)
    return fxopt.transform(
        shared.model, "canonicalize", example_inputs=shared.example, verify=False
    )


def program_of(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Program:
    """The capture of `model` on `inputs`: the shared one, where they are those of a shared case."""
    name = _CASES.get((id(model), id(inputs)))
    return captured(name) if name is not None else capture(model, inputs)


def assert_untouched() -> None:
    """Every shared program and model is what it was when it was captured."""
    for name, (text, state) in _SEEN.items():
        assert str(captured(name).graph) == text, f"a test edited the shared program of {name}"
        for key, tensor in case(name).model.state_dict().items():
            same = torch.equal(tensor, state[key])
            assert same, f"a test wrote to {key} of the shared model {name}"
