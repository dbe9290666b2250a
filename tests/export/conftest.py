"""What every export of torch builds anew."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> Iterator[None]:
    # torch reads the signatures of all ONNX functions at each export: a third of a second.
    build = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> Any:
        registry = copy.copy(build(opset_version))
        registry.functions = {name: [*known] for name, known in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
