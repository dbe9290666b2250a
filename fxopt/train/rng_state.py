"""The states of all random generators that a training run draws from, as plain values.

torch's (CPU and, once CUDA is in use, each CUDA device), Python's, NumPy's, and those of a
DataLoader or its samplers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

RngState: TypeAlias = dict[str, Any]
"""What `torch.load(weights_only=True)` reads: tensors, numbers and containers."""


def rng_state(generators: Sequence[torch.Generator] = ()) -> RngState:
    """The present states; `generators` are the data's own."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "generators": [generator.get_state() for generator in generators],
    }


def set_rng_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put every generator where it was when `state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)


@contextmanager
def rng_state_kept(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """What is drawn inside leaves the generators where they were."""
    before = rng_state(generators)
    try:
        yield
    finally:
        set_rng_state(before, generators)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators of the process start from `seed` inside, and are as before after it."""
    with rng_state_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
