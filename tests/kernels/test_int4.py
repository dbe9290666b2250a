"""int4: what is packed comes back, and the fused linear is the product with the unpacked weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.errors import KernelError
from fxopt.kernels import PACKED_WEIGHTS, int4, native, pack_int4

ops = torch.ops.fxopt
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def exact(q: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x @ Wᵀ + b in float64."""
    groups = scale.shape[1]
    dense = (q.double().view(*scale.shape[:2], -1) * scale.double().view(-1, groups, 1)).view_as(q)
    y = x.double() @ dense.t()
    return y if bias is None else y + bias.double()


def assert_is_product(y: Tensor, q: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Within rounding of a sum of such terms: relative to the sum of their magnitudes."""
    size = exact(q.abs(), scale, x.abs(), None if bias is None else bias.abs())
    error = (y.double() - exact(q, scale, x, bias)).abs()
    assert y.dtype == x.dtype
    assert bool((error <= TOLERANCE[x.dtype] * size).all()), (error / size).max()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q [N, K], scale [N, K/g], x [..., K] and bias, at sizes that aten takes and at others."""
    group = draw(st.sampled_from([2, 6, 32, 64, 128, 256]))
    inner = group * draw(st.sampled_from([1, 2, 3, 5]))
    outputs = draw(st.sampled_from([1, 5, 8, 16, 24, 48, 80, 144]))
    rows = draw(st.sampled_from([(1,), (2,), (3, 1), (2, 3, 5), (47,), (48,), (49,), (70,), ()]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = draw(st.sampled_from([(-8, 8), (-7, 8), (7, 8), (-8, -7), (0, 1)]))
    q = torch.randint(low, high, (outputs, inner), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, inner // group, generator=generator) + 0.01
    x = torch.randn(*rows, inner, generator=generator).to(dtype)
    if draw(st.booleans()):
        x[..., draw(st.integers(0, inner - 1))] *= 1000  # one outlier channel
    bias = torch.randn(outputs, generator=generator).to(dtype) if draw(st.booleans()) else None
    return q, scale, x, bias


@given(layers())
def test_the_fused_linear_is_the_exact_product(drawn: Any) -> None:
    q, scale, x, bias = drawn
    assert_is_product(ops.int4_weight_only_linear(x, pack_int4(q), scale, bias), *drawn)


@given(layers())
def test_so_is_the_definition(drawn: Any) -> None:
    q, scale, x, bias = drawn
    assert_is_product(int4._reference(x, pack_int4(q), scale, bias), *drawn)


@given(layers())
def test_the_numerics_level_says_the_same(drawn: Any) -> None:
    q, scale, x, _ = drawn
    unpacked = ops.unpack_int4(pack_int4(q)).view(*scale.shape, -1)
    dense = ops.dequantize(unpacked, scale[:, :, None], x.dtype).view(q.shape)
    assert torch.equal(dense, int4._dense_on_cpu(pack_int4(q), scale, x.dtype))


def test_every_byte_unpacks_to_its_halves() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    q = ops.unpack_int4(packed)
    low, high = q[:, ::2].flatten().tolist(), q[:, 1::2].flatten().tolist()
    signed = [value - 16 if value > 7 else value for value in range(16)]
    assert low == [signed[byte % 16] for byte in range(256)]
    assert high == [signed[byte // 16] for byte in range(256)]
    assert torch.equal(pack_int4(q), packed)
    assert torch.equal(int4._unpack_on_cpu(packed), q)
    assert torch.equal(ops.unpack_int4(packed.flatten()), q.flatten())


@pytest.fixture
def by_libraries() -> Iterator[None]:
    with native.without():
        yield


@pytest.mark.usefixtures("by_libraries")
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_atens_kernel_is_right_at_every_size_it_takes(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other kernels of its family were wrong or crashed at odd sizes, so all corners are visited.
    monkeypatch.setattr(int4, "_has_vectors", lambda: True)
    used = []
    few_rows = int4._few_rows
    monkeypatch.setattr(int4, "_few_rows", lambda *args: used.append(1) or few_rows(*args))
    cases = 0
    for inner in (group, 3 * group, 5 * group):
        for outputs in (16, 32, 48, 64, 80, 96, 112, 128, 272):
            q = torch.randint(-8, 8, (outputs, inner), dtype=torch.int8)
            scale = torch.rand(outputs, inner // group) + 0.1
            for rows in (1, 2, 3, 4, 5, 8, 17, 48):
                x = torch.randn(rows, inner).bfloat16()
                y = ops.int4_weight_only_linear(x, pack_int4(q), scale, None)
                assert_is_product(y, q, scale, x, None)
                cases += 1
    assert len(used) == cases


@pytest.mark.parametrize("outputs", [16, 64, 80, 272])
def test_a_weight_packed_in_chunks_is_the_one_packed_whole(
    outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randint(-8, 8, (outputs, 64), dtype=torch.int8)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    monkeypatch.setattr(int4, "_CHUNK_ELEMENTS", 1)
    assert torch.equal(int4._pack_for_cpu(pack_int4(q)), whole)
    assert torch.equal(
        int4._dense_on_cpu(pack_int4(q), torch.ones(outputs, 2), torch.float32), q.float()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_scales_and_inputs(dtype: torch.dtype) -> None:
    q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    for scale in (torch.zeros(16, 2), torch.full((16, 2), 1e-38), torch.full((16, 2), 1e30)):
        x = torch.randn(3, 64).to(dtype)
        assert_is_product(
            ops.int4_weight_only_linear(x, pack_int4(q), scale, None), q, scale, x, None
        )
    x = torch.ones(3, 64, dtype=dtype)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    y = ops.int4_weight_only_linear(x, pack_int4(q.clamp_min(1)), torch.ones(16, 2), None)
    assert not y[:2].isfinite().any()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
@pytest.mark.parametrize("outputs", [0, 16])
def test_no_rows_and_no_outputs(shape: tuple[int, ...], outputs: int) -> None:
    packed = torch.zeros(outputs, 32, dtype=torch.uint8)
    y = ops.int4_weight_only_linear(torch.randn(shape), packed, torch.ones(outputs, 2), None)
    assert y.shape == (*shape[:-1], outputs)
    x = torch.randn(3, 0)
    empty = ops.int4_weight_only_linear(x, packed[:, :0], torch.ones(outputs, 1), None)
    assert torch.equal(empty, torch.zeros(3, outputs))


def test_a_weight_written_in_place_is_packed_anew() -> None:
    q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    packed, scale, x = pack_int4(q), torch.rand(16, 2), torch.randn(2, 64).bfloat16()
    before = ops.int4_weight_only_linear(x, packed, scale, None)
    scale.mul_(2)
    torch.testing.assert_close(ops.int4_weight_only_linear(x, packed, scale, None), before * 2)
    packed.copy_(pack_int4(-q))
    torch.testing.assert_close(ops.int4_weight_only_linear(x, packed, scale, None), before * -2)


@pytest.mark.usefixtures("by_libraries")
def test_copies_die_with_their_weight() -> None:
    PACKED_WEIGHTS.clear()
    q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    packed, scale = pack_int4(q), torch.rand(16, 2)
    ops.int4_weight_only_linear(torch.randn(2, 64).bfloat16(), packed, scale, None)
    assert len(PACKED_WEIGHTS) == (2 if int4._has_vectors() else 0)
    del packed, scale
    assert len(PACKED_WEIGHTS) == 0


def test_inference_tensors_are_multiplied_too() -> None:
    with torch.inference_mode():
        q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
        scale, x = torch.rand(16, 2), torch.randn(2, 64).bfloat16()
        y = ops.int4_weight_only_linear(x, pack_int4(q), scale, None)
    assert_is_product(y, q, scale, x, None)


def test_it_trains_its_input_and_bias() -> None:
    x = torch.randn(6, 4, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    packed, scale = pack_int4(torch.randint(-7, 8, (5, 6), dtype=torch.int8)), torch.rand(5, 3)
    assert torch.autograd.gradcheck(
        lambda x, bias: ops.int4_weight_only_linear(x, packed, scale, bias), (x, bias)
    )


def test_wrong_arguments_say_what_is_needed() -> None:
    packed, scale, x = torch.zeros(4, 3, dtype=torch.uint8), torch.ones(4, 2), torch.ones(2, 6)
    linear = ops.int4_weight_only_linear
    with pytest.raises(
        KernelError, match=r"int8 \[N, K\] with an even K, not torch.int8 of \(2, 3"
    ):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(KernelError, match=r"values in \[-8, 7\], not \[0, 8\]"):
        pack_int4(torch.tensor([[0, 8]], dtype=torch.int8))
    with pytest.raises(KernelError, match=r"needs uint8, two values a byte, not torch.int8"):
        ops.unpack_int4(packed.view(torch.int8))
    with pytest.raises(
        KernelError, match=r"float x and uint8 packed weight, not torch.float32, torch"
    ):
        linear(x, packed.view(torch.int8), scale, None)
    with pytest.raises(KernelError, match=r"a packed weight \[N, K/2\], not \(2, 6\) and \(4, 2\)"):
        linear(x, packed[:, :2], scale, None)
    for wrong in (scale[:3], torch.ones(4, 4), torch.ones(4), torch.ones(4, 0)):
        with pytest.raises(KernelError, match=r"scales \[N, K/g\], one for each group of g of the"):
            linear(x, packed, wrong, None)


class Int4Model(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.register_buffer("packed", pack_int4(torch.randint(-7, 8, (64, 64), dtype=torch.int8)))
        self.register_buffer("scale", torch.rand(64, 2) / 20)
        self.register_buffer("bias", torch.randn(64))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype)
        if self.fused:
            y = ops.int4_weight_only_linear(x, self.packed, self.scale, bias)
        else:
            q = ops.unpack_int4(self.packed).view(64, 2, 32)
            dense = ops.dequantize(q, self.scale[:, :, None], x.dtype).view(64, 64)
            y = nn.functional.linear(x, dense, bias)
        return nn.functional.gelu(y) + x


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survives_compile_export_and_state_dict(
    fused: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Int4Model(fused).eval()
    x = torch.randn(3, 5, 64).to(dtype)
    expected = model(x)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, **close)
        y = torch.randn(2, 9, 64).to(dtype)
        torch.testing.assert_close(compiled(y), model(y), **close)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(module(x), expected, **close)
    other = Int4Model(fused).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_the_schema_checks_of_torch(dtype: torch.dtype) -> None:
    q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    torch.library.opcheck(ops.unpack_int4.default, (pack_int4(q),))
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    args = (x, pack_int4(q), torch.rand(16, 2), torch.randn(16, dtype=dtype))
    torch.library.opcheck(ops.int4_weight_only_linear.default, args)


def test_what_cuda_reads_holds_eight_more_and_the_even_column_first() -> None:
    # The layout itself is made by a CUDA kernel; what goes into it is plain arithmetic.
    seen = []
    convert = torch.ops.aten._convert_weight_to_int4pack
    q = torch.randint(-8, 8, (8, 128), dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.ops.aten, "_convert_weight_to_int4pack", lambda w, tiles: seen.append(w) or w
        )
        int4._pack_for_cuda(pack_int4(q))
    assert torch.ops.aten._convert_weight_to_int4pack is convert
    assert torch.equal((seen[0] >> 4).int(), q[:, ::2].int() + 8)
    assert torch.equal((seen[0] & 15).int(), q[:, 1::2].int() + 8)


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("group", [32, 64, 128, 256])
    @pytest.mark.parametrize(("outputs", "inner"), [(8, 256), (24, 768), (1024, 1280), (5, 512)])
    def test_it_is_the_exact_product(
        self, outputs: int, inner: int, group: int, dtype: torch.dtype
    ) -> None:
        q = torch.randint(-8, 8, (outputs, inner), dtype=torch.int8)
        scale = torch.rand(outputs, inner // group) + 0.1
        for rows in (1, 3, 17, 48, 49, 200):
            x = torch.randn(rows, inner).to(dtype)
            args = (x.cuda(), pack_int4(q).cuda(), scale.cuda(), None)
            assert_is_product(ops.int4_weight_only_linear(*args).cpu(), q, scale, x, None)
