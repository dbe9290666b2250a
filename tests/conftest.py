"""One hypothesis profile for every run: the same examples each time, no clock."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=25,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    # Deprecations inside torch and transformers are theirs to fix.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch|transformers")
