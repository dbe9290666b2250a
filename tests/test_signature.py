"""Calls are bound as Python binds them, and every misfit is refused in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fxopt.calls import bind, describe_leaves, forward_signature, unbind
from fxopt.errors import InputError, OutsideError
from fxopt.signature import Range, Signature, TensorInput, gathered


def _forward(x: Any, y: Any = None, *rest: Any, flag: bool = False, scale: Any = 1.0, **more: Any):
    """Stands for a model's `forward` with every kind of parameter."""


def _signature(
    named: Mapping[str, Any],
    ranges: Mapping[str, Range] | None = None,
    forward: Callable[..., Any] = _forward,
    symbols: Callable[[str], tuple[str, ...]] = lambda path: ("batch", "length"),
) -> Signature:
    """A signature as capture would make it; rank-2 tensors are [batch, length], others fixed."""
    _, spec = pytree.tree_flatten(dict(named))
    leaves = tuple(
        TensorInput(
            path, leaf.dtype, leaf.device, symbols(path) if leaf.ndim == 2 else tuple(leaf.shape)
        )
        if isinstance(leaf, Tensor)
        else leaf
        for path, leaf in describe_leaves(named)
    )
    _, out_spec = pytree.tree_flatten({"hidden": 0, "count": 0})
    return Signature(
        inspect.signature(forward), spec, leaves, ranges or {}, out_spec, out_constants={1: 7}
    )


_IDS = torch.zeros(2, 3, dtype=torch.int64)
_MASK = torch.ones(2, 3)
_CAPTURED = {"x": _IDS, "y": _MASK}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((_IDS, _MASK), {}),
        ((_IDS,), {"y": _MASK}),
        ((), {"x": _IDS, "y": _MASK}),
        ((), {"y": _MASK, "x": _IDS}),
        ((_IDS, _MASK), {"flag": False, "scale": 1.0}),
        ((_IDS, _MASK), {"labels": None}),
    ],
    ids=["positional", "mixed", "keywords", "any order", "defaults spelled out", "None left out"],
)
def test_every_way_to_spell_one_call_flattens_alike(args: Any, kwargs: Any) -> None:
    tensors = _signature(_CAPTURED).flatten(args, kwargs)
    assert [id(tensor) for tensor in tensors] == [id(_IDS), id(_MASK)]


def test_dynamic_sizes_may_change_together() -> None:
    signature = _signature(_CAPTURED)
    tensors = signature.flatten((_IDS.new_zeros(5, 9), torch.ones(5, 9)), {})
    assert [tuple(tensor.shape) for tensor in tensors] == [(5, 9), (5, 9)]


def test_nested_inputs_are_flattened_in_order_and_named() -> None:
    named = {"x": {"left": _IDS, "right": [_MASK, 3]}}
    signature = _signature(named)
    assert [tensor.path for tensor in signature.tensors] == ["x['left']", "x['right'][0]"]
    assert len(signature.flatten((named["x"],), {})) == 2


def test_unflatten_gives_the_models_own_type_and_its_constants() -> None:
    assert _signature(_CAPTURED).unflatten([_MASK]) == {"hidden": _MASK, "count": 7}
    _, spec = pytree.tree_flatten(BaseModelOutput(last_hidden_state=0))
    signature = Signature(inspect.signature(_forward), spec, (), {}, spec, {})
    output = signature.unflatten([_MASK])
    assert isinstance(output, BaseModelOutput)
    assert output.last_hidden_state is _MASK
    assert output.hidden_states is None


def test_a_constant_left_out_is_forwards_default() -> None:
    signature = _signature({**_CAPTURED, "flag": True})
    assert signature.constants == {"flag": True}
    assert len(signature.flatten((_IDS, _MASK), {"flag": True})) == 2
    with pytest.raises(OutsideError) as caught:
        signature.flatten((_IDS, _MASK), {})
    assert str(caught.value) == (
        "this call leaves out flag, so that the model runs with flag=False, but the graph was "
        "captured with True. Give flag=True in the call, or transform the model again with "
        "example_inputs that leave it out."
    )


def test_a_constant_that_the_capture_added_may_be_left_out() -> None:
    signature = replace(_signature({**_CAPTURED, "flag": True}), added=frozenset({"flag"}))
    assert len(signature.flatten((_IDS, _MASK), {})) == 2
    assert len(signature.flatten((_IDS, _MASK), {"flag": True})) == 2


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            (_IDS,),
            {},
            "the graph was captured with the arguments (x, y); this call leaves out y. Call it "
            "with the same arguments, or transform the model again with example_inputs that hold "
            "these.",
        ),
        (
            (_IDS, _MASK),
            {"labels": _IDS},
            "the graph was captured with the arguments (x, y); this call adds labels. Call it "
            "with the same arguments, or transform the model again with example_inputs that hold "
            "these.",
        ),
        ((_IDS, 3), {}, "y must be a tensor (y: torch.float32[batch, length] on cpu), not 3"),
        (
            (_IDS.float(), _MASK),
            {},
            "x has dtype torch.float32, but the graph was captured with torch.int64. Convert it "
            "with .to(torch.int64).",
        ),
        (
            (_IDS[0], _MASK),
            {},
            "x has rank 1 and shape (3,), but the graph takes rank 2: x: torch.int64[batch, "
            "length] on cpu.",
        ),
        (
            (_IDS, torch.ones(2, 4)),
            {},
            "y has size 4 on axis 1, but x axis 1 has 3; the model needs them equal.",
        ),
    ],
    ids=["left out", "added", "no tensor", "dtype", "rank", "unequal"],
)
def test_a_call_that_does_not_fit_is_refused(args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        _signature(_CAPTURED).flatten(args, kwargs)
    assert str(caught.value) == text


def test_another_nesting_is_refused() -> None:
    signature = _signature({"x": [_IDS, _IDS]})
    with pytest.raises(InputError, match=r"nested otherwise than at capture: got .* captured .*"):
        signature.flatten(([_IDS],), {})


def test_another_constant_is_refused() -> None:
    signature = _signature({**_CAPTURED, "scale": 2.0})
    with pytest.raises(InputError) as caught:
        signature.flatten((_IDS, _MASK), {"scale": 3.0})
    assert str(caught.value) == (
        "scale is 3.0 in this call, but the graph was captured with 2.0. Transform the model "
        "again with example_inputs that hold the new value."
    )


def test_a_constant_set_back_to_its_default_is_refused() -> None:
    signature = _signature({**_CAPTURED, "flag": True})
    with pytest.raises(InputError, match="flag is False in this call"):
        signature.flatten((_IDS, _MASK), {"flag": False})


def test_a_tensor_in_place_of_a_constant_is_refused() -> None:
    signature = _signature({**_CAPTURED, "scale": 2.0})
    with pytest.raises(InputError, match=r"scale is tensor\(.*in this call"):
        signature.flatten((_IDS, _MASK), {"scale": torch.ones(2)})


def test_a_fixed_size_is_refused_by_name() -> None:
    signature = _signature({"x": torch.zeros(2, 3, 8)})
    with pytest.raises(InputError) as caught:
        signature.flatten((torch.zeros(2, 3, 9),), {})
    assert str(caught.value) == (
        "x has size 9 on axis 2, but the model fixes it to 8: x: torch.float32[2, 3, 8] on cpu."
    )


def test_a_size_over_its_range_is_refused() -> None:
    signature = _signature({"x": _IDS}, {"length": Range(2, 64)})
    assert signature.flatten((_IDS.new_zeros(2, 64),), {})
    with pytest.raises(InputError) as caught:
        signature.flatten((_IDS.new_zeros(2, 65),), {})
    assert str(caught.value) == "x has size 65 on axis 1; the model takes at most 64 there."


def test_inputs_that_forward_does_not_take_are_refused() -> None:
    signature = forward_signature(nn.Linear(2, 2))
    with pytest.raises(InputError) as caught:
        bind(signature, (1, 2), {})
    assert "the inputs don't fit forward(input: " in str(caught.value)
    assert str(caught.value).endswith(
        "too many positional arguments. Give a tuple of positional arguments or a dict of keyword "
        "arguments."
    )
    with pytest.raises(InputError, match="missing a required argument: 'input'"):
        bind(signature, (), {})


def _record(
    a: Any, /, b: Any = None, c: Any = 2, *args: Any, d: Any = None, e: bool = True, **more: Any
) -> dict[str, Any]:
    given = {"a": a, "b": b, "c": c, "args": args, "d": d, "e": e, **more}
    return {name: value for name, value in given.items() if value is not None}


_VALUES = st.one_of(st.none(), st.integers(0, 3), st.booleans(), st.just("text"))
_FILLED = st.one_of(st.integers(0, 3), st.just("text"))


@given(
    args=st.lists(_FILLED, min_size=1, max_size=5),
    kwargs=st.dictionaries(st.sampled_from(["d", "f", "g"]), _VALUES),
    flag=st.booleans(),
)
def test_unbind_calls_as_the_original_call_did(args: Any, kwargs: Any, flag: bool) -> None:
    signature = inspect.signature(_record)
    kwargs = {**kwargs, "e": flag}
    again_args, again_kwargs = unbind(signature, bind(signature, args, kwargs))
    assert _record(*again_args, **again_kwargs) == _record(*args, **kwargs)


@given(skipped=st.sets(st.sampled_from(["y", "flag", "scale"])))
def test_none_and_defaults_bind_to_nothing(skipped: set[str]) -> None:
    defaults = {"y": None, "flag": False, "scale": 1.0}
    kwargs = {name: defaults[name] for name in skipped}
    assert bind(inspect.signature(_forward), (_IDS,), kwargs) == {"x": _IDS}


def test_true_is_not_the_default_one() -> None:
    assert bind(inspect.signature(_forward), (), {"x": 1, "scale": True})["scale"] is True


def test_items_of_one_container_are_told_together() -> None:
    named = [("x", "a"), ("keys[0]", "b"), ("keys[1]", "b"), ("keys[2]", "c"), ("values[0]", "c")]
    assert gathered(named) == [
        ("x", "a"),
        ("keys[0] to keys[1]", "b"),
        ("keys[2]", "c"),
        ("values[0]", "c"),
    ]
