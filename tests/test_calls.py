"""The inputs of a call as one value, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.calls import check_batches, check_inputs, spread
from fxopt.errors import InputError

VALUES = st.lists(st.integers() | st.none(), max_size=3)


@given(VALUES, st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.integers(), max_size=3))
def test_a_call_comes_back_from_its_inputs(args: list[Any], kwargs: dict[str, int]) -> None:
    assert spread(tuple(args)) == spread(args) == (tuple(args), {})
    assert spread(kwargs) == spread(MappingProxyType(kwargs)) == ((), kwargs)


def test_a_tensor_is_the_one_argument_and_a_mapping_is_copied() -> None:
    x = torch.zeros(2)
    assert spread(x)[0][0] is x
    given = {"x": x}
    assert spread(given)[1] is not given


@pytest.mark.parametrize("inputs", [torch.zeros(1), (1,), [1], {"x": 1}])
def test_each_form_passes(inputs: Any) -> None:
    check_inputs(inputs, "inputs", InputError)


def test_what_is_no_inputs_is_named() -> None:
    with pytest.raises(InputError) as caught:
        check_inputs("text", "example_inputs", InputError)
    assert str(caught.value) == (
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        "arguments, not str"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (torch.zeros(1), "data= is one input (a Tensor), not an iterable of inputs. Give a list "
                         "of them: [inputs]"),
        ({"x": 1}, "data= is one input (a dict), not an iterable of inputs. Give a list of them: "
                   "[inputs]"),
        (b"text", "data= must be an iterable of inputs (a list, a DataLoader, a generator), not "
                  "bytes"),
        (3, "data= must be an iterable of inputs (a list, a DataLoader, a generator), not int"),
    ],
)  # fmt: skip
def test_what_is_no_batches_is_named(source: Mapping[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        check_batches(source, "data=", InputError)
    assert str(caught.value) == text


def test_batches_of_any_kind_pass() -> None:
    for source in ([], (), iter([1]), (one for one in (1,))):
        check_batches(source, "data=", InputError)
