"""What a model keeps in Python: its modules' attributes, put back as a run of ours found them.

`self.last = x`, `self.calls += 1` and `self.seen.append(x)` in forward change the model. A run that
the user didn't make, real or on fake tensors, must leave none of it behind.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.interpreter import fork_rng

_MOST_VISITED = 20_000
"""Objects; a model that refers to more (a data set, say) has the nearest ones put back."""

_OWN_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_NO_STATE = (
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, Enum),
    *(torch.dtype, torch.device, torch.Size, *_PLAIN),
)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[list[str]]:
    """Put the Python attributes of every module of `model` back after the block.

    That is which objects they are, what lists, dicts, sets and plain objects among them hold, the
    tensors in the places of buffers and parameters, the values of tensors that are neither, and
    the state of random generators. Gives a list that names, after the block, what it had changed,
    such as `head.calls`.
    """
    changed: list[str] = []
    snapshot = _Snapshot(model)
    try:
        yield changed
    finally:
        changed += snapshot.restore()


@contextmanager
def left_alone(model: nn.Module) -> Iterator[list[str]]:
    """`attributes_kept`, and the values of buffers and the random generators put back as well."""
    before = [(one, one.detach().clone(), _version(one)) for one in model.buffers()]
    try:
        with fork_rng(), attributes_kept(model) as changed:
            yield changed
    finally:
        with torch.no_grad():
            for buffer, value, version in before:
                if _version(buffer) != version:
                    buffer.copy_(value)


@dataclass(frozen=True)
class _Held:
    """A shallow copy of what an object or container held; `dotted` says how its parts are named."""

    path: str
    content: Any
    before: Any
    dotted: bool

    def part(self, key: Any) -> str:
        return f"{self.path}.{key}".removeprefix(".") if self.dotted else f"{self.path}[{key!r}]"


class _Snapshot:
    """Shallow copies of everything in reach of the modules that can change."""

    def __init__(self, model: nn.Module) -> None:
        self.held: list[_Held] = []
        self.tensors: list[tuple[str, Tensor, Tensor, int]] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        modules = dict(model.named_modules())
        self.known = {id(one) for one in (*modules.values(), *model.parameters(), *model.buffers())}
        self.waiting: deque[tuple[str, Any, bool]] = deque()
        for path, module in modules.items():
            self.waiting.append((path, vars(module), True))
        while self.waiting and len(self.held) < _MOST_VISITED:
            self._visit(*self.waiting.popleft())

    def restore(self) -> list[str]:
        """Put back what differs; return the paths."""
        changed = []
        for held in self.held:
            keys = _differing(held.content, held.before)
            if keys:
                changed += [held.path if key is None else held.part(key) for key in keys]
                _put_back(held.content, held.before)
        for path, tensor, copy, version in self.tensors:
            if _version(tensor) != version or version < 0:
                changed += [path] if version >= 0 else []
                with torch.no_grad():
                    tensor.copy_(copy)
        for generator, state in self.generators:
            generator.set_state(state)
        return changed

    def _visit(self, path: str, value: Any, dotted: bool) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor) and not value.is_meta:
                self.tensors.append((path, value, value.detach().clone(), _version(value)))
        elif isinstance(value, torch.Generator):
            self.generators.append((value, value.get_state()))
        elif isinstance(value, (dict, list, tuple, set, deque)):
            before = dict(value) if isinstance(value, dict) else list(value)
            held = _Held(path, value, before, dotted)
            if not isinstance(value, tuple):
                self.held.append(held)
            for key, item in before.items() if isinstance(before, dict) else enumerate(before):
                self._wait(held.part(key), item)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._visit(path, vars(value), True)

    def _wait(self, path: str, item: Any) -> None:
        if isinstance(item, _NO_STATE) or id(item) in self.known:
            return
        self.known.add(id(item))
        table = path.rpartition(".")[2] in _OWN_TABLES
        self.waiting.append((path.rpartition(".")[0] if table else path, item, table))


def _differing(content: Any, before: Any) -> list[Any]:
    """The keys under which a container holds something else by now; [None] for one without."""
    if isinstance(content, dict):
        missing = object()
        keys = dict.fromkeys((*before, *content))
        return [k for k in keys if not _same(content.get(k, missing), before.get(k, missing))]
    now = list(content)
    same = len(now) == len(before) and all(map(_same, now, before))
    return [] if same else [None]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other)


def _put_back(content: Any, before: Any) -> None:
    if isinstance(content, dict):
        # Past what a subclass makes of it: a ModelOutput lets nothing be deleted.
        kind = OrderedDict if isinstance(content, OrderedDict) else dict
        moved = [key for key in content if key in before] != list(before)
        for key in [key for key in content if moved or key not in before]:
            kind.__delitem__(content, key)
        for key, value in before.items():
            kind.__setitem__(content, key, value)
    elif isinstance(content, list):
        content[:] = before
    else:
        content.clear()
        content.update(before) if isinstance(content, set) else content.extend(before)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
