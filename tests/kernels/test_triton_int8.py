"""The Triton kernel against exact integer arithmetic, interpreted; and compiled for real GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.int8_linear_fused import EPILOGUES, Call, in_triton, reference
from tests.kernels.interpreted import interpreter, needs_triton

pytestmark = needs_triton

Run = Callable[..., Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# (rows, columns, inner) of a block: few rows, a square, more columns than inner.
SHAPES = ((16, 128, 128), (64, 64, 128), (128, 128, 64))


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with interpreter() as call:
        yield call


def interpreted(call: Call, block: tuple[int, int, int], wide: bool = False) -> Tensor:
    """The kernel's result; `wide` makes its offsets 64 bits wide, which large sizes do by
    themselves."""
    from fxopt.kernels import triton_int8

    narrow, triton_int8._NARROW = triton_int8._NARROW, 0 if wide else 2**31
    try:
        return in_triton(call, blocks=triton_int8.Blocks(*block, stages=3, warps=4))
    finally:
        triton_int8._NARROW = narrow


def exact_sum(call: Call) -> Tensor:
    """int64 `[..., N]`: what the kernel has before the scales."""
    q = call.q.long() if call.zero_point is None else call.q.long() - call.zero_point.long()
    return q @ call.weight.long().t()


def _matrix(draw: st.DrawFn, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    low, high = draw(st.sampled_from([(-128, 128), (-128, -127), (127, 128), (0, 1)]))
    matrix = torch.randint(low, high, (rows, columns), dtype=torch.int8, generator=generator)
    return matrix.t().contiguous().t() if draw(st.booleans()) else matrix


def _a_row(draw: st.DrawFn, rows: int, make: Callable[..., Tensor]) -> Tensor:
    return make(1) if draw(st.booleans()) else make(rows, 1)


@st.composite
def calls(draw: st.DrawFn, scaled: bool = True) -> Call:
    """One row, odd K, N that no block divides, saturating values, one scale or one a row."""
    sizes = st.sampled_from([1, 2, 16, 17, 64, 65, 129]) | st.integers(1, 140)
    rows, inner, outputs = (draw(sizes) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def positive(*shape: int) -> Tensor:
        return 2e-3 + torch.rand(shape, generator=generator) / 50 if scaled else torch.ones(shape)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

    with_zero, with_bias = draw(st.booleans()), scaled and draw(st.booleans())
    return Call(
        _matrix(draw, rows, inner, generator),
        _a_row(draw, rows, positive),
        _a_row(draw, rows, integers) if with_zero else None,
        _matrix(draw, outputs, inner, generator),
        positive(outputs, 1),
        None,
        torch.randn(outputs, generator=generator) if with_bias else None,
        draw(st.sampled_from(FLOATS)) if scaled else torch.float32,
        draw(st.sampled_from(sorted(EPILOGUES))) if scaled else "none",
    )


@given(call=calls(scaled=False), block=st.sampled_from(SHAPES), wide=st.booleans())
def test_the_sum_is_exact(run: Run, call: Call, block: tuple[int, int, int], wide: bool) -> None:
    assert torch.equal(run(interpreted, call, block, wide), exact_sum(call).float())


@given(call=calls(), block=st.sampled_from(SHAPES))
def test_the_epilogue_is_the_definition(run: Run, call: Call, block: tuple[int, int, int]) -> None:
    y = run(interpreted, call, block)
    assert y.dtype == call.dtype
    truth = reference(*call._replace(dtype=torch.float64))
    # Values of a few hundred cancel into activations near zero: the absolute error is theirs.
    size = (exact_sum(call).double().abs() * call.scale * call.weight_scale.view(-1)).max().item()
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest: 2^-7 in place of 2^-8.
    rounding = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 2**-7}[call.dtype]
    torch.testing.assert_close(y.double(), truth, rtol=rounding, atol=2e-6 * max(size, 1.0))


@pytest.mark.parametrize("post_op", sorted(EPILOGUES))
def test_each_epilogue(run: Run, post_op: str) -> None:
    torch.manual_seed(0)
    q, weight = (torch.randint(-128, 128, (n, 65), dtype=torch.int8) for n in (20, 33))
    scale, weight_scale = torch.rand(20, 1) / 100, torch.rand(33, 1) / 100
    bias = torch.randn(33)
    call = Call(q, scale, None, weight, weight_scale, None, bias, torch.float32, post_op)
    torch.testing.assert_close(
        run(interpreted, call, SHAPES[1]), reference(*call), rtol=1e-5, atol=1e-5
    )


def test_long_saturated_sums_are_exact(run: Run) -> None:
    q = torch.full((3, 20_001), -128, dtype=torch.int8)
    weight = torch.full((5, 20_001), -128, dtype=torch.int8)
    one, zero_point = torch.ones(1), torch.full((3, 1), 127, dtype=torch.int8)
    for zero in (None, zero_point):
        call = Call(q, one, zero, weight, torch.ones(5), None, None, torch.float32, "none")
        exact = exact_sum(call)
        assert exact[0, 0] == 20_001 * 128 * (128 if zero is None else 255)
        assert torch.equal(run(interpreted, call, SHAPES[0]), exact.float())


def test_blocks_are_visited_once_each_in_whole_and_partial_groups(run: Run) -> None:
    torch.manual_seed(0)
    q, weight = (torch.randint(-128, 128, (n, 9), dtype=torch.int8) for n in (20 * 16 + 1, 300))
    call = Call(q, torch.ones(1), None, weight, torch.ones(300), None, None, torch.float32, "none")
    assert torch.equal(run(interpreted, call, SHAPES[0]), exact_sum(call).float())


@pytest.mark.parametrize("shape", [(0, 8, 8), (4, 0, 6), (3, 8, 0)])
def test_nothing_to_do_is_done(run: Run, shape: tuple[int, int, int]) -> None:
    rows, inner, outputs = shape
    q, weight = (torch.zeros(n, inner, dtype=torch.int8) for n in (rows, outputs))
    bias = torch.randn(outputs)
    scales = torch.ones(rows, 1), torch.ones(outputs, 1)
    call = Call(q, scales[0], None, weight, scales[1], None, bias, torch.float32, "relu")
    assert torch.equal(run(interpreted, call, SHAPES[0]), reference(*call))


@pytest.mark.parametrize("post_op", sorted(EPILOGUES))
def test_nan_stays_nan(run: Run, post_op: str) -> None:
    q = torch.ones(3, 8, dtype=torch.int8)
    scale = torch.tensor([[1.0], [float("nan")], [float("inf")]])
    call = Call(q, scale, None, q[:2], torch.ones(2), None, None, torch.float32, post_op)
    y = run(interpreted, call, SHAPES[0])
    assert y[0].isfinite().all()
    assert not y[1:].isfinite().any()


def test_rows_are_bucketed_for_the_autotuner() -> None:
    from fxopt.kernels.triton_int8 import rows_bucket

    rows = (1, 16, 17, 64, 65, 4096, 10**6)
    assert [rows_bucket(count) for count in rows] == [16, 16, 32, 64, 128, 4096, 16384]


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("post_op", sorted(EPILOGUES))
def test_it_compiles_to_int8_tensor_core_code(
    capability: int, instruction: str, post_op: str
) -> None:
    # The compiler needs no GPU, and refuses Python that the interpreter runs.
    ptx = _compiled(capability, post_op, zero_point=post_op == "none", whole=post_op != "relu")
    assert instruction in ptx
    assert ".s32.s8.s8" in ptx
    # A plain maximum turns NaN into zero on a GPU, which the interpreter doesn't show.
    assert "max.f32" not in ptx


def test_sizes_of_one_compile() -> None:
    # Triton makes constants of arguments that are 1.
    ones = ("outputs", "inner", "q_stride", "weight_stride", "scale_stride", "zero_point_stride")
    assert "mma" in _compiled(90, "gelu", zero_point=True, whole=False, ones=ones)


def _compiled(
    capability: int, post_op: str, *, zero_point: bool, whole: bool, ones: tuple[str, ...] = ()
) -> str:
    import triton
    from triton.backends.compiler import GPUTarget

    from fxopt.kernels.triton_int8 import Blocks, int8_linear_kernel

    blocks = Blocks(128, 128, 64, stages=3, warps=8)
    constants = {
        "POST_OP": post_op,
        "HAS_ZERO_POINT": zero_point,
        "HAS_BIAS": True,
        "WIDE": not whole,
        "WHOLE_K": whole,
        **blocks.meta,
        **dict.fromkeys(ones, 1),
    }
    kernel = int8_linear_kernel.fn
    pointers = {"out": "*bf16", "weight_sums": "*i32", "bias": "*bf16"}
    pointers |= dict.fromkeys(("scale", "weight_scale"), "*fp32")
    pointers |= dict.fromkeys(("q", "weight", "zero_point"), "*i8")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    ptx: str = triton.compile(source, target=target, options=options).asm["ptx"]
    return ptx
