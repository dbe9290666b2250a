"""The CUDA side of the kernels; what can be shown without a GPU is shown on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.kernels import int8, quantize_weight

SHAPES = [(1, 8, 8), (3, 7, 5), (16, 64, 24), (17, 33, 40), (64, 128, 256), (0, 8, 8)]

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


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
    assert torch.equal(int8._product_on_cuda(q, weight), _exact(q, weight))


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
