"""One hypothesis profile for every run: the same examples each time, no clock.

A failing example is printed as drawn; `--hypothesis-profile=shrink` searches for a smaller one,
which takes minutes, since each step captures a model.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.utils._traceback
from hypothesis import HealthCheck, Phase, settings

from fxopt.kernels import native
from fxopt.timing import Latency, summarize, timings_in

pytest_plugins = ["pytester", "tests.seeds", "tests.sweeps"]

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores: threads that outnumber them wait for each other. The variable is for
    # the processes that tests start.
    _WORKERS = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# pytest gives its handlers to every logger that doesn't propagate, and torch's trace of what it
# compiles is written, with a stack for each size, as soon as it has one.
logging.getLogger("torch.__trace").propagate = True

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


def int8_halves(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    """Latencies by which each kernel takes half the time of the first, the float one."""
    return {name: summarize([0.5 if index else 1.0] * 9) for index, name in enumerate(systems)}


@pytest.fixture(autouse=True, scope="session")
def _steady_timings() -> Iterator[None]:
    # What a plan holds must not depend on how busy the machine is that runs the tests.
    with timings_in(None, int8_halves):
        yield


@pytest.fixture(autouse=True, scope="session")
def _fakes_computed_anew() -> Iterator[None]:
    # A graph of few layers pays more for torch's cache of fake results than it gets back.
    # tests/capture has it, and so have the processes that tests start.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture(autouse=True, scope="session")
def _lines_read_when_shown() -> Iterator[None]:
    # A capture notes the stack at every node, of which it keeps the frames of the model: the code
    # of the hundred others, pytest's and torch's own, need not be looked up.
    def frames(symbolized: Sequence[Any], skip: int) -> traceback.StackSummary:
        kept = ((one["filename"], one["line"], one["name"]) for one in symbolized[skip:])
        return traceback.StackSummary(
            reversed([traceback.FrameSummary(*one, lookup_line=False) for one in kept])
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils._traceback, "_extract_symbolized_tb", frames)
        yield


@pytest.fixture
def compiled_kernels() -> None:
    """Kernels compiled for this CPU run its operators; where there can be none, the test skips."""
    answer = native.load()
    if not answer:
        pytest.skip(answer.reason)


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    # Deprecations inside torch and transformers are theirs to fix.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch|transformers")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    # A collection looks at all that is alive, modules, caches and graphs of torch among it; what
    # outlives a file of tests stays for good, and out of the collections of the next.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _shared_models() -> Iterator[None]:
    yield
    captured = sys.modules.get("tests.captured")
    if captured is not None:
        captured.assert_untouched()


@pytest.fixture(autouse=True, scope="session")
def _interrupts() -> None:
    # A shell starts what runs in the background without them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
