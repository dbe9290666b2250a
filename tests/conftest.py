"""One hypothesis profile for every run: the same examples each time, no clock.

A failing example is printed as drawn; `--hypothesis-profile=shrink` searches for a smaller one,
which takes minutes, since each step captures a model.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping

import pytest
import torch._dynamo
from hypothesis import HealthCheck, Phase, settings

from fxopt.measure import Latency, summarize, timings_in

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


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of every later collection, which would look at all of it."""
    gc.collect()
    gc.freeze()


def int8_halves(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    """Latencies by which each kernel takes half the time of the first, the float one."""
    return {name: summarize([0.5 if index else 1.0] * 9) for index, name in enumerate(systems)}


@pytest.fixture(autouse=True, scope="session")
def _steady_timings() -> Iterator[None]:
    # What a plan holds must not depend on how busy the machine is that runs the tests.
    with timings_in(None, int8_halves):
        yield


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    # Deprecations inside torch and transformers are theirs to fix.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch|transformers")
