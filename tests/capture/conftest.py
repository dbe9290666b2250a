"""The capture as users have it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _fakes_kept() -> Iterator[None]:
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        yield
