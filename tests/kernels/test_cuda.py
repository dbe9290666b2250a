"""The CUDA side of the kernels; what can be shown without a GPU is shown on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.device import Device
from fxopt.kernels import int8_linear, quantize_weight
from fxopt.kernels.float8 import FLOAT8, quantize_weight_float8
from fxopt.kernels.int8_linear_fused import EPILOGUES, Call, row_sums

SHAPES = [(1, 8, 8), (3, 7, 5), (16, 64, 24), (17, 33, 40), (64, 128, 256), (0, 8, 8)]

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

needs_float8 = pytest.mark.skipif(
    not Device.describe("cuda").accelerates(FLOAT8),
    reason=Device.describe("cuda").accelerates(FLOAT8).reason,
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _exact(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (q.long() @ weight.long().t()).int()


@pytest.mark.parametrize(("rows", "inner", "outputs"), SHAPES)
def test_padding_to_what_cublas_takes_changes_no_number(
    rows: int, inner: int, outputs: int
) -> None:
    # The padding is plain torch, so the CPU's product can stand in for cuBLAS's.
    q, weight = _int8(2, rows, inner), _int8(outputs, inner)
    assert torch.equal(int8_linear._product_on_cuda(q, weight), _exact(q, weight))


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize(("rows", "inner", "outputs"), SHAPES)
    def test_the_int8_product_is_exact(self, rows: int, inner: int, outputs: int) -> None:
        q, weight = _int8(rows, inner), _int8(outputs, inner)
        got = torch.ops.fxopt.int8_product(q.cuda(), weight.cuda())
        assert torch.equal(got.cpu(), _exact(q, weight))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_weight_only_agrees_with_the_definition(self, dtype: torch.dtype) -> None:
        x = torch.randn(5, 64, device="cuda", dtype=dtype)
        weight, scale = quantize_weight(torch.randn(32, 64, device="cuda"))
        got = torch.ops.fxopt.int8_weight_only_linear(x, weight, scale, None)
        dense = torch.ops.fxopt.dequantize(weight, scale, dtype)
        torch.testing.assert_close(got, nn.functional.linear(x, dense), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("mode", [None, "reduce-overhead"])
    def test_a_lowered_int8_model_keeps_its_claim(self, mode: str | None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval().cuda()
        x = torch.randn(40, 64, device="cuda")
        passes = [fxopt.Int8Linear(), fxopt.Lower(mode=mode)]
        opt = fxopt.transform(model, passes, example_inputs=(x,), measure_cost=False)
        assert all(step.record.holds for step in opt.steps)
        for batch in (1, 40, 70):
            y = torch.randn(batch, 64, device="cuda")
            assert fxopt.Sqnr(25.0).measure(model(y).detach(), opt(y)).holds

    def test_a_model_moved_to_the_gpu_runs_there(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
        opt = fxopt.transform(model, "canonicalize", example_inputs=(torch.randn(3, 16),))
        x = torch.randn(4, 16, device="cuda")
        moved = opt.cuda()
        torch.testing.assert_close(moved(x).cpu(), model(x.cpu()), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("post_op", sorted(EPILOGUES))
    @pytest.mark.parametrize(("rows", "inner", "outputs"), [*SHAPES, (4, 0, 6), (300, 1024, 513)])
    def test_the_fused_int8_layer_agrees_with_its_definition(
        self, rows: int, inner: int, outputs: int, post_op: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        weight = _int8(outputs, inner)
        call = Call(
            _int8(rows, inner),
            torch.rand(rows, 1) / 100,
            _int8(rows, 1) if post_op == "gelu" else None,
            weight,
            torch.rand(outputs, 1) / 100,
            row_sums(weight),
            torch.randn(outputs),
            dtype,
            post_op,
        )
        there = (value.cuda() if isinstance(value, torch.Tensor) else value for value in call)
        got = torch.ops.fxopt.int8_linear_fused(*there).cpu()
        truth = torch.ops.fxopt.int8_linear_fused(*call._replace(dtype=torch.float64))
        assert got.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("post_op", sorted(EPILOGUES))
    def test_the_fused_int8_layer_hides_no_nan(self, post_op: str) -> None:
        q, weight = _int8(3, 16).cuda(), _int8(8, 16).cuda()
        scale = torch.tensor([[1.0], [float("nan")], [float("inf")]], device="cuda")
        y = torch.ops.fxopt.int8_linear_fused(
            q, scale, None, weight, scale.new_ones(8), None, None, torch.float32, post_op
        )
        assert y[0].isfinite().all()
        assert y[1].isnan().all()

    def test_the_fused_int8_layer_survives_torch_compile(self) -> None:
        q, weight = _int8(40, 64).cuda(), _int8(48, 64).cuda()
        scale, weight_scale = torch.rand(40, 1).cuda(), torch.rand(48, 1).cuda()
        options = (None, torch.bfloat16, "gelu")

        def layer(q: torch.Tensor) -> torch.Tensor:
            y = torch.ops.fxopt.int8_linear_fused(
                q, scale[: len(q)], None, weight, weight_scale, None, *options
            )
            return y * 2

        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(layer, mode=mode, dynamic=False)
            for _ in range(3):
                torch.testing.assert_close(compiled(q), layer(q))

    @pytest.mark.slow
    def test_results_of_more_than_two_to_the_31_entries(self) -> None:
        rows, inner, outputs = 65_552, 32, 32_784
        q, weight = _int8(rows, inner), _int8(outputs, inner)
        ones = torch.ones(1, device="cuda"), torch.ones(outputs, device="cuda")
        y = torch.ops.fxopt.int8_linear_fused(
            q.cuda(), ones[0], None, weight.cuda(), ones[1], None, None, torch.float16, "none"
        )
        expected = _exact(q[-3:], weight).half()
        assert torch.equal(y[-3:].cpu(), expected)

    @needs_float8
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "inner", "outputs"), [*SHAPES, (300, 1024, 513)])
    def test_float8_linear_agrees_with_its_definition(
        self, rows: int, inner: int, outputs: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        q, scale = torch.ops.fxopt.quantize_float8(torch.randn(2, rows, inner))
        operands = (q, scale, *quantize_weight_float8(torch.randn(outputs, inner)))
        bias = torch.randn(outputs)
        there = (tensor.cuda() for tensor in (*operands, bias))
        got = torch.ops.fxopt.float8_linear(*there, dtype).cpu()
        truth = torch.ops.fxopt.float8_linear(*operands, bias, torch.float64)
        size = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        # Hopper's tensor cores keep some 14 bits of a float8 sum even between exact additions.
        tolerance = max(TOLERANCE[dtype], 1e-3)
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance * size)

    @needs_float8
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_lowered_float8_model_keeps_its_claim(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        model = model.eval().cuda().to(dtype)
        x = torch.randn(40, 64, device="cuda", dtype=dtype)
        passes = [fxopt.Float8Linear(), fxopt.Lower()]
        opt = fxopt.transform(model, passes, example_inputs=(x,), measure_cost=False)
        assert opt.steps[0].record.fired == {"QuantizeFloat8Linear": 2}
        for batch in (1, 40, 70):
            y = torch.randn(batch, 64, device="cuda", dtype=dtype)
            assert fxopt.Sqnr(18.0).measure(model(y).detach(), opt(y)).holds
