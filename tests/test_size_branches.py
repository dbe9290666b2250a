"""Whatever a model asks about sizes, each call gets eager's numbers, or is refused by name."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt
from fxopt.errors import CaptureError, InputError
from tests.size_branches import Branching, Sizes, branching_models, inputs, sizes

_DRAWS = int(os.environ.get("BRANCH_DRAWS", "60"))
"""How many models the slow sweep draws; 500 take a quarter of an hour on two fast cores."""

_CALLS = st.lists(sizes(0) | sizes(), min_size=5, max_size=5)


def check(model: Branching, example: Sizes, calls: list[Sizes], recapture: str) -> None:
    """Each call is eager's, or refused: by name where nothing may be captured, never else."""
    model.eval()
    try:
        model(*inputs(example))
    except Exception:
        return  # no example for this model
    try:
        opt = fxopt.transform(
            model, "canonicalize", example_inputs=inputs(example), recapture=recapture
        )
    except CaptureError:
        return  # torch.export can't take it, whatever the branches
    for call in (example, *calls):
        given = inputs(call)
        try:
            expected = model(*given)
        except Exception:
            with pytest.raises((InputError, RuntimeError, ValueError, IndexError)):
                opt(*given)
            continue
        result = answer(opt, given)
        if isinstance(result, str):
            assert ".shape[" in result or "has size" in result, call
            assert recapture == "error" or "can't be captured as a graph" in result, call
        else:
            close = torch.testing.assert_close
            close(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=str(call))


def answer(opt: fxopt.Optimized, given: tuple[Tensor, ...]) -> Tensor | str:
    """The module's result, or the text with which it refuses the call."""
    try:
        result: Tensor = opt(*given)
    except InputError as refusal:
        return str(refusal)
    return result


@settings(max_examples=5)
@given(branching_models(), sizes(), _CALLS, st.sampled_from(["auto", "error", "error"]))
def test_a_call_is_eagers_or_refused_by_name(
    model: Branching, example: Sizes, calls: list[Sizes], recapture: str
) -> None:
    check(model, example, calls, recapture)


@pytest.mark.slow
@settings(max_examples=_DRAWS)
@given(branching_models(), sizes(), _CALLS, st.sampled_from(["auto", "error", "error"]))
def test_many_branches(
    model: Branching, example: Sizes, calls: list[Sizes], recapture: str
) -> None:
    check(model, example, calls, recapture)
