"""Who runs an operator on the CPU: a library, until the compiled kernels take its place.

A library's implementation of `name` stays at hand as the operator `name_by_library`, which the
compiled kernel calls for what it doesn't take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "fxopt"

_by_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_implementations: dict[str, Callable[..., Any]] = {}
_registered: dict[str, torch.library.Library] = {}


def on_cpu(schema: str, implementation: Callable[..., Any]) -> None:
    """Run the operator of `schema` by `implementation` on the CPU, until compiled kernels do."""
    name, _, rest = schema.partition("(")
    _by_library.define(f"{name}_by_library({rest}")
    _by_library.impl(f"{name}_by_library", implementation, "CompositeExplicitAutograd")
    _implementations[name] = implementation
    _register(name)


def serves(operator: Any) -> bool:
    """Whether compiled kernels can take the place of a library for this operator overload."""
    return getattr(operator, "namespace", "") == _NAMESPACE and (
        operator._schema.name.removeprefix(f"{_NAMESPACE}::") in _implementations
    )


def unregister_libraries() -> None:
    """Take back what `on_cpu` registered, but for the operators by their longer names."""
    while _registered:
        _, library = _registered.popitem()
        library._destroy()


def register_libraries() -> None:
    """Register again what `unregister_libraries` took back."""
    for name in _implementations.keys() - _registered.keys():
        _register(name)


def _register(name: str) -> None:
    library = torch.library.Library(_NAMESPACE, "IMPL", "CPU")
    library.impl(name, _implementations[name])
    _registered[name] = library
