"""One hypothesis profile for every run: the same examples each time, no clock.

A failing example is printed as drawn; `--hypothesis-profile=shrink` searches for a smaller one,
which takes minutes, since each step captures a model.
"""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=25,
    print_blob=False,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("shrink", settings.get_profile("fixed"), phases=tuple(Phase))
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    # Deprecations inside torch and transformers are theirs to fix.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch|transformers")
