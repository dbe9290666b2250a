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
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_registered: dict[str, torch.library.Library] = {}


def on_cpu(schema: str, implementation: Callable[..., Any], kernels: str = "products") -> None:
    """Run the operator of `schema` by `implementation` on the CPU, until the compiled kernels of
    the set of that name do."""
    name, _, rest = schema.partition("(")
    _by_library.define(f"{name}_by_library({rest}")
    _by_library.impl(f"{name}_by_library", implementation, "CompositeExplicitAutograd")
    _implementations.setdefault(kernels, {})[name] = implementation
    _register(name, implementation)


def serves(operator: Any, kernels: str) -> bool:
    """Whether compiled kernels of that set can take the place of a library for this operator
    overload."""
    return getattr(operator, "namespace", "") == _NAMESPACE and (
        operator._schema.name.removeprefix(f"{_NAMESPACE}::") in _implementations[kernels]
    )


def unregister_libraries(kernels: str) -> None:
    """Take back what `on_cpu` registered, but for the operators by their longer names."""
    for name in _implementations[kernels].keys() & _registered.keys():
        _registered.pop(name)._destroy()


def register_libraries(kernels: str) -> None:
    """Register again what `unregister_libraries` took back."""
    for name, implementation in _implementations[kernels].items():
        if name not in _registered:
            _register(name, implementation)


def _register(name: str, implementation: Callable[..., Any]) -> None:
    library = torch.library.Library(_NAMESPACE, "IMPL", "CPU")
    library.impl(name, implementation)
    _registered[name] = library
