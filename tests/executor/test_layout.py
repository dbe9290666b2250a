"""What has no listing is refused, with the reason; a prefix may be of any length."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.executor import Executor
from fxopt.executor.layout import prefixes_of
from tests.executor.graphs import Built, drawn

aten, ops = torch.ops.aten, torch.ops.fxopt


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda b, x: b.call(aten.topk.default, x, 1), "no instruction computes aten.topk"),
        (lambda b, x: b.call(aten.pow.Tensor_Scalar, x, 1.7), "the power 1.7"),
        (lambda b, x: b.call(aten.mean.dim, x, [0]), r"a mean over the axes \[0\]"),
        (lambda b, x: b.call(aten.to.dtype, x, torch.bfloat16), "float32 into torch.bfloat16"),
        (
            lambda b, x: b.call(aten.div.Tensor_mode, x, 2.0, rounding_mode="floor"),
            "no instruction",
        ),
        (
            lambda b, x: b.call(aten.slice.Tensor, x, 0, 3, 3),
            r"has no entries: \(0, 4\)",
        ),
        (lambda b, x: b.call(aten.linear.default, x, x), "a product of two values"),
        (lambda b, x: x, "is returned as it was given"),
    ],
)
def test_what_has_no_listing_is_refused(make: Any, reason: str) -> None:
    built = Built()
    x = built.input(drawn(3, 4))
    made = make(built, x)
    made = made if isinstance(made.meta["val"], Tensor) else built.call(operator.getitem, made, 0)
    executor = Executor(built.module(made))
    with pytest.raises(AssertionError, match=reason):
        assert executor.refusal(built.inputs) is None, executor.refusal(built.inputs)
    assert executor(built.inputs) is None


def attention(built: Built, past: int) -> Any:
    """Attention of two tokens to a prefix that lies slot by slot."""
    q = built.input(drawn(1, 4, 2, 8))
    k = built.input(drawn(1, 2, 2, 8, seed=1))
    keys, values = (built.input(drawn(past, 1, 2, 8, seed=seed)) for seed in (2, 3))
    past_seen, seen = (built.input(torch.ones(1, n, dtype=torch.bool)) for n in (past, 2))
    by_head = [built.call(aten.permute.default, one, [1, 2, 0, 3]) for one in (keys, values)]
    return built.call(ops.cached_attention.default, q, k, k, *by_head, past_seen, seen, 0.5)


def test_one_listing_is_for_prefixes_of_any_length() -> None:
    built = Built()
    module = built.module(attention(built, 5))
    executor = Executor(module)
    assert len(prefixes_of(module.graph)) == 3
    for past in (5, 1, 70):
        other = Built()
        inputs = (attention(other, past), other.inputs)[1]
        found = executor(inputs)
        assert found is not None
        torch.testing.assert_close(found[0], module(*inputs)[0])
    assert len(executor._known) == 1


def test_a_prefix_of_other_sizes_is_an_error() -> None:
    built = Built()
    executor = Executor(built.module(attention(built, 5)))
    inputs = list(built.inputs)
    inputs[2] = inputs[2][..., :4]
    with pytest.raises(RuntimeError, match="other sizes than the step was laid out for"):
        executor(inputs)


def test_a_prefix_that_is_read_otherwise_is_none() -> None:
    built = Built()
    attended = attention(built, 5)
    keys = [node for node in built.graph.nodes if node.op == "placeholder"][2]
    more = built.call(aten.neg.default, keys)
    module = built.module(attended, more)
    assert len(prefixes_of(module.graph)) == 2
    assert "its prefix is computed" in str(Executor(module).refusal(built.inputs))


def test_a_prefix_in_int8() -> None:
    built = Built()
    q, k = built.input(drawn(1, 4, 2, 8)), built.input(drawn(1, 2, 2, 8, seed=1))
    keys, key_scale = ops.quantize_per_token(drawn(5, 1, 2, 8, seed=2))
    values, value_scale = ops.quantize_per_token(drawn(5, 1, 2, 8, seed=3))
    past = [built.input(one) for one in (keys, values)]
    for scale in (key_scale, value_scale):
        past.append(built.call(aten.unsqueeze.default, built.input(scale.squeeze(-1)), -1))
    past_seen, seen = (built.input(torch.ones(1, n, dtype=torch.bool)) for n in (5, 2))
    by_head = [built.call(aten.permute.default, one, [1, 2, 0, 3]) for one in past]
    attended = built.call(
        ops.int8_cached_attention.default, q, k, k, *by_head, past_seen, seen, 0.5
    )
    module = built.module(attended)
    assert len(prefixes_of(module.graph)) == 5
    found = Executor(module)(built.inputs)
    assert found is not None
    torch.testing.assert_close(found[0], module(*built.inputs)[0])
