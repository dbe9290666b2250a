"""The architectures and their captures, made once a process; programs are frozen, so tests share.

A test that writes to a model or to a program makes its own, with `ARCHITECTURES[name]()`; that no
test has written to a shared one is asserted when the tests end.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.pipeline import nested
from fxopt.program import Mode, Program
from tests.architectures import ARCHITECTURES, Case

_CASES: dict[tuple[int, int], str] = {}
_TRAINABLE: dict[Hashable, tuple[nn.Module, fxopt.Optimized]] = {}
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


@contextlib.contextmanager
def captured_once(model: nn.Module, inputs: Any) -> Iterator[Program]:
    """The capture of `model` on `inputs`, which `transform` takes as well while this lasts."""
    program = capture(model, inputs)
    text, state = str(program.graph), dict(program.state)

    def known(other: nn.Module, given: Any, mode: Mode = "eval", **options: Any) -> Program:
        if other is model and given is inputs and mode == "eval" and not any(options.values()):
            return program
        return capture(other, given, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nested, "capture", known)
        yield program
    assert str(program.graph) == text, "the shared program's graph was edited"
    assert list(program.state) == list(state)
    assert all(program.state[name] is tensor for name, tensor in state.items())


def trainable(model: nn.Module, example: Any, passes: str = "canonicalize") -> Any:
    """`model` captured in train mode, over parameters of its own; of equal ones the first is."""
    key = (passes, _identity(model), _digest(example))
    if key not in _TRAINABLE:
        own = copy.deepcopy(model)  # kept, since other sizes are captured from it
        made = fxopt.transform(own, passes, example_inputs=example, mode="train")
        _TRAINABLE[key] = own, made
    return copy.deepcopy(_TRAINABLE[key][1])


def _identity(model: nn.Module) -> Hashable:
    """What a capture of `model` depends on: classes, plain attributes, config, state."""
    modules = [
        (name, type(module), repr(module), _plain(vars(module)))
        for name, module in model.named_modules()
    ]
    config = str(vars(model.config)) if hasattr(model, "config") else ""
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    trains = [(name, tensor.requires_grad, id(tensor)) for name, tensor in state]
    ties = tuple((name, grad, [i for *_, i in trains].index(i)) for name, grad, i in trains)
    return (*modules, config, ties, _digest(dict(state)))


def _plain(attributes: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in attributes.items() if isinstance(v, (int, float, str, tuple))}
    return repr(kept)


def _digest(values: Any) -> str:
    """Of every tensor's dtype, shape and bits, and of everything else."""
    leaves, spec = pytree.tree_flatten(values)
    digest = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def assert_untouched() -> None:
    """Every shared program and model is what it was when it was captured."""
    for name, (text, state) in _SEEN.items():
        assert str(captured(name).graph) == text, f"a test edited the shared program of {name}"
        for key, tensor in case(name).model.state_dict().items():
            same = torch.equal(tensor, state[key])
            assert same, f"a test wrote to {key} of the shared model {name}"
