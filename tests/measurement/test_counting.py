"""Work counted on graphs against what the operators must do by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.measurement.counting import UnsizedError, count_work


class Run(nn.Module):
    def __init__(self, run, **tensors):
        super().__init__()
        self.run = run
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *xs):
        return self.run(self, *xs)


def work_of(run, *inputs, at=None, **tensors):
    """(flops, bytes) by node name."""
    program = capture(Run(run, **tensors).eval(), inputs)
    return {item.node: (item.flops, item.bytes) for item in count_work(program, at or inputs)}


def floats(*shape):
    return torch.zeros(shape)


SIZE = st.integers(2, 9)


@given(SIZE, SIZE, SIZE, SIZE)
def test_a_linear_reads_its_operands_once_and_writes_its_result_once(rows, k, n, other):
    linear = nn.Linear(k, n).eval()
    program = capture(linear, floats(rows, k))
    for count in (rows, other, 1):
        (item,) = count_work(program, [floats(count, k)])
        assert item.flops == 2 * count * k * n
        assert item.bytes == 4 * (count * k + k * n + n + count * n)
        assert item.dtype == "float32"


def test_the_sizes_are_those_of_the_call_also_where_the_capture_doubled_a_batch_of_one():
    (found,) = work_of(lambda _, x: x + 1, floats(1, 5)).values()
    assert found == (0, 4 * (5 + 5))


def test_an_operand_given_twice_is_read_once():
    (found,) = work_of(lambda _, x: x * x, floats(3, 5)).values()
    assert found == (0, 2 * 60)


def test_views_are_free_and_reading_a_broadcast_moves_what_lies_under_it():
    found = work_of(
        lambda m, x: m.row[None, :].expand(x.shape[0], -1) * x.t().t(), floats(3, 5), row=floats(5)
    )
    assert list(found.values()) == [(0, 4 * (5 + 15 + 15))]


def test_a_slice_moves_only_its_entries():
    found = work_of(lambda _, x: x[:, :2] + 1, floats(3, 5))
    assert list(found.values()) == [(0, 4 * (6 + 6))]


def test_a_reshape_that_must_copy_moves_bytes():
    found = work_of(lambda _, x: x.t().reshape(-1) + 1, floats(3, 5))
    assert list(found.values()) == [(0, 120), (0, 120)]
    assert list(work_of(lambda _, x: x.reshape(-1) + 1, floats(3, 5)).values()) == [(0, 120)]


def test_contiguous_is_free_only_where_it_does_nothing():
    assert len(work_of(lambda _, x: x.contiguous() + 1, floats(3, 5))) == 1
    assert len(work_of(lambda _, x: x.t().contiguous() + 1, floats(3, 5))) == 2


def test_a_cast_reads_one_dtype_and_writes_another():
    found = work_of(lambda _, x: x.to(torch.bfloat16), floats(3, 5))
    assert list(found.values()) == [(0, 15 * (4 + 2))]


def test_an_embedding_reads_the_rows_that_it_gives():
    ids = torch.tensor([[1, 2, 3]])
    found = work_of(lambda m, i: nn.functional.embedding(i, m.table), ids, table=floats(1000, 8))
    assert list(found.values()) == [(0, 2 * 3 * 8 * 4 + 3 * 8)]


def test_sizes_are_no_work():
    found = work_of(lambda _, x: x + x.shape[0], floats(3, 5))
    assert len(found) == 1


def test_attention_counts_both_products():
    q = floats(2, 4, 6, 8)
    run = nn.functional.scaled_dot_product_attention
    (found,) = work_of(lambda _, a, b, c: run(a, b, c), q, q.clone(), q.clone()).values()
    assert found == (2 * 2 * (2 * 4 * 6 * 8) * 6, 4 * 4 * q.numel())


@pytest.mark.parametrize(
    ("passes", "dtype"),
    [
        ("int8-linear{mode=dynamic},select-kernels", "int8"),
        ("int8-linear{mode=weight_only},select-kernels", "float32"),
        ("prepack", "float32"),
    ],
)
def test_our_own_kernels_do_the_products_of_what_they_replace(passes, dtype):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(48, 64)
    before = count_work(program := capture(model, x), [x])
    optimized = fxopt.transform(model, passes, example_inputs=x).program
    assert optimized.graph is not program.graph
    after = count_work(optimized, [x])
    assert sum(i.flops for i in after) == sum(i.flops for i in before) == 4 * 48 * 64 * 128
    assert {item.dtype for item in after if item.flops} == {dtype}


def test_a_size_that_depends_on_values_is_refused():
    class Chosen(nn.Module):
        def forward(self, x):
            return x[x[:, 0] > 0] + 1

    program = capture(Chosen().eval(), torch.randn(6, 3))
    with pytest.raises(UnsizedError, match=r"has a size that the inputs' sizes don't tell"):
        count_work(program, [torch.randn(6, 3)])
