"""fxopt::int8_cached_attention: what cached_attention gives on the prefix that int8 stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError

pytestmark = pytest.mark.usefixtures("decoded_by")

ops = torch.ops.fxopt


def arguments(rows: int, past: int, new: int, groups: int = 1, seed: int = 0) -> dict[str, Any]:
    """A call with 2 key heads of 4 entries, values of 3, and `groups` query heads for each."""
    torch.manual_seed(seed)
    key, key_scale = ops.quantize_per_token(torch.randn(rows, 2, past, 4))
    value, value_scale = ops.quantize_per_token(torch.randn(rows, 2, past, 3))
    return {
        "q": torch.randn(rows, 2 * groups, new, 4),
        "k": torch.randn(rows, 2, new, 4),
        "v": torch.randn(rows, 2, new, 3),
        "past_k": key,
        "past_v": value,
        "past_k_scale": key_scale,
        "past_v_scale": value_scale,
        "past_seen": torch.rand(rows, past) < 0.8,
        "seen": torch.rand(rows, new) < 0.9,
        "scale": 0.5,
    }


@settings(max_examples=80)
@given(
    rows=st.integers(1, 2),
    past=st.integers(0, 9) | st.sampled_from([64, 65, 300]),
    new=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 3, 9]),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.floats(0.5, 3),
    sinks=st.booleans(),
    seed=st.integers(0, 3),
)
def test_it_is_attention_to_what_int8_stands_for(
    rows: int,
    past: int,
    new: int,
    groups: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    given_ = arguments(rows, past, new, groups, seed)
    options = {
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(2 * groups) if sinks else None,
    }
    found = ops.int8_cached_attention(**given_, **options)
    scales = {name: given_.pop(f"{name}_scale") for name in ("past_k", "past_v")}
    floats = {name: given_.pop(name).float() * scale for name, scale in scales.items()}
    wanted = ops.cached_attention(**given_, **floats, **options)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_its_fake_is_of_the_same_kind() -> None:
    given_ = arguments(2, 5, 3, 2)
    torch.library.opcheck(
        ops.int8_cached_attention.default,
        tuple(given_.values()),
        test_utils=("test_schema", "test_faketensor"),
    )


def _wide(past: Tensor) -> Tensor:
    return past.float()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "past_k",
            _wide,
            "needs past_k of torch.int8 with scales of torch.float32, not torch.float",
        ),
        ("past_v_scale", torch.Tensor.half, "not torch.int8 with torch.float16"),
        (
            "past_k_scale",
            lambda scale: scale.squeeze(-1),
            r"past_k \[B, G, P, D\] with a scale for each slot and head, \[B, G, P, 1\], not",
        ),
        ("past_v_scale", lambda scale: scale[:, :, 1:], r"\(2, 2, 5, 3\) with \(2, 2, 4, 1\)"),
    ],
)
def test_other_kinds_are_refused(name: str, change: Any, message: str) -> None:
    given_ = arguments(2, 5, 1)
    given_[name] = change(given_[name])
    with pytest.raises(KernelError, match=message):
        ops.int8_cached_attention(**given_)
