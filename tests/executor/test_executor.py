"""Calls of listings: what they are given, what state they read, what is kept of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fxopt.executor import Executor, executor_of
from fxopt.executor import executor as executor_module
from fxopt.kernels import native
from tests.executor.graphs import Built, drawn, rms_norm, run

aten, ops = torch.ops.aten, torch.ops.fxopt


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_out_of_range_is_an_error(index: int) -> None:
    built = Built()
    ids = built.input(torch.tensor([[0, 1]]))
    rows = built.call(aten.embedding.default, built.constant(drawn(8, 4)), ids)
    executor = Executor(built.module(rows))
    with pytest.raises(IndexError, match=f"index {index} is out of range for 8 rows"):
        executor([torch.tensor([[0, index]])])


def test_many_entries_go_to_all_threads() -> None:
    built = Built()
    x = built.input(drawn(1, 70_001))
    y = built.call(aten.tanh.default, x)
    tall = built.input(drawn(3001, 12))
    turned = built.call(aten.transpose.int, tall, 0, 1)
    z = built.call(aten.add.Tensor, turned, 1.0)
    n = rms_norm(built, tall, None)
    for found, wanted in zip(*run(built, y, z, n), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_inputs_may_be_strided() -> None:
    built = Built()
    built.input(drawn(3, 4))
    x = next(iter(built.graph.nodes))
    executor = Executor(built.module(built.call(aten.neg.default, x)))
    given = drawn(4, 3).t()
    found = executor([given])
    assert found is not None
    assert torch.equal(found[0], -given)


def test_state_that_was_replaced_counts() -> None:
    built = Built()
    x = built.input(drawn(3, 4))
    module = built.module(built.call(aten.add.Tensor, x, built.constant(drawn(4, seed=1))))
    executor = Executor(module)
    executor(built.inputs)
    module.w0 = torch.ones(4)
    found = executor(built.inputs)
    assert found is not None
    assert torch.equal(found[0], built.inputs[0] + 1)


def test_kinds_of_calls_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "_MOST_KINDS", 2)
    built = Built()
    x = built.input(drawn(2, 3))
    executor = Executor(built.module(built.call(aten.neg.default, x)))
    executor(built.inputs)
    executor(built.inputs)
    assert len(executor._known) == 1


def test_only_steps_have_an_executor() -> None:
    built = Built()
    x = built.input(drawn(2, 3))
    assert executor_of(built.module(built.call(aten.neg.default, x))) is None


def test_state_of_another_kind_is_no_longer_listed() -> None:
    built = Built()
    x = built.input(drawn(3, 4))
    module = built.module(built.call(aten.add.Tensor, x, built.constant(drawn(4, seed=1))))
    executor = Executor(module)
    assert executor(built.inputs) is not None
    for other, reason in (
        (torch.ones(4, dtype=torch.float64), "w0 is torch.float64"),
        (torch.ones(1), r"w0 is torch.float32 \(1,\) by now"),
        (torch.ones(8)[::2], "w0 isn't contiguous"),
    ):
        module.w0 = other
        assert executor(built.inputs) is None
        with pytest.raises(AssertionError, match=reason):
            assert executor.refusal(built.inputs) is None, executor.refusal(built.inputs)
    module.w0 = torch.ones(4)
    assert executor(built.inputs) is not None


def test_inputs_of_another_dtype_are_not_listed() -> None:
    built = Built()
    x = built.input(drawn(3, 4))
    executor = Executor(built.module(built.call(aten.neg.default, x)))
    assert executor(built.inputs) is not None
    assert executor([built.inputs[0].double()]) is None


def test_state_whose_memory_was_exchanged_is_an_error() -> None:
    built = Built()
    x = built.input(drawn(4, 4))
    module = built.module(built.call(aten.add.Tensor, x, built.constant(drawn(4, 4, seed=1))))
    executor = Executor(module)
    executor(built.inputs)
    module.w0.data = drawn(4, 4).t()
    with pytest.raises(RuntimeError, match="a tensor that is held isn't contiguous"):
        executor(built.inputs)


def test_calls_from_several_threads_at_once() -> None:
    """Each has a team of its own."""
    built = Built()
    x = built.input(drawn(2, 300))
    weight = built.constant(drawn(700, 300, seed=1))
    y = built.call(ops.packed_linear.default, x, weight, None, "silu", None)
    y = built.call(aten.tanh.default, y)
    module = built.module(y)
    executor = Executor(module)
    wanted = module(*built.inputs)[0]
    executor(built.inputs)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(executor, [built.inputs] * 60):
            assert found is not None
            torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(count: int) -> None:
    built = Built()
    x = built.input(drawn(1, 512))
    for seed in range(12):
        weight = built.constant(drawn(512, 512, seed=seed) / 23)
        x = built.call(ops.packed_linear.default, x, weight, None, "none", None)
    module = built.module(x)
    executor = Executor(module)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = [executor(built.inputs) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    wanted = module(*built.inputs)[0]
    for one in found:
        assert one is not None
        torch.testing.assert_close(one[0], wanted, rtol=1e-4, atol=1e-4)


def test_without_the_kernels_nothing_is_executed() -> None:
    built = Built()
    x = built.input(drawn(2, 3))
    executor = Executor(built.module(built.call(aten.neg.default, x)))
    with native.without():
        assert executor(built.inputs) is None
    assert executor(built.inputs) is not None
