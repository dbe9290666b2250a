"""HalfAttention: what is rounded, how far its casts move, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt import FuseLinears, HalfAttention, PassError, Prepack, Sqnr
from fxopt.capture import capture
from fxopt.device import Device, pretending
from fxopt.kernels import native
from fxopt.program import Program
from tests.check import check
from tests.models import Attention

aten = torch.ops.aten
PASS = HalfAttention(force=True)
X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))


class Given(nn.Module):
    """aten's attention on queries, keys and values as they come."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


def inputs(dtype: torch.dtype = torch.float32, groups: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    shapes = [(3, 4, 5, 8), (3, groups, 7, 8), (3, groups, 7, 8)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def casts(program: Program) -> list[fx.Node]:
    return [
        node
        for node in program.graph.nodes
        if node.target is aten.to.dtype and node.args[1] == torch.bfloat16
    ]


def test_casts_end_at_the_linears() -> None:
    torch.manual_seed(0)
    result = check(
        PASS, Attention(16, 4, False, True), (X,), {"RoundAttention": 1, "CastBeforeView": 6}
    )
    assert [str(node.args[0].target) for node in casts(result)] == ["aten.linear.default"] * 3  # type: ignore[union-attr]
    (attention,) = [
        node
        for node in result.graph.nodes
        if node.target is aten.scaled_dot_product_attention.default
    ]
    assert attention.meta["val"].dtype == torch.bfloat16
    (back,) = attention.users
    assert back.target is aten.to.dtype
    assert back.args[1] == torch.float32


def test_the_three_casts_behind_one_product_are_one() -> None:
    torch.manual_seed(0)
    model = Attention(16, 4, True, True)
    fused = fxopt.transform(model, [FuseLinears(), PASS], example_inputs=(X,))
    assert fused.report.steps[-1].fired["CastBeforeSplit"] == 1
    (cast,) = casts(fused.program)
    assert cast.args[0].target is aten.linear.default  # type: ignore[union-attr]


class Unbound(nn.Module):
    """Queries, keys and values of one product, taken apart as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).movedim(1, -2).unbind(1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_the_casts_behind_an_unbind_are_one() -> None:
    torch.manual_seed(0)
    fires = {"RoundAttention": 1, "CastBeforeSplit": 1, "CastBeforeView": 2}
    (cast,) = casts(check(PASS, Unbound(), (X,), fires))
    assert cast.args[0].target is aten.linear.default  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}], ids=str)
def test_options_of_attention_stay(options: dict[str, Any]) -> None:
    check(PASS, Given(**options), inputs(), {"RoundAttention": 1})


def test_masks_and_grouped_heads_stay() -> None:
    visible = torch.rand(3, 1, 5, 7) < 0.7
    visible[..., 0] = True
    for mask in (visible, torch.randn(3, 1, 1, 7)):
        check(PASS, Given(), (*inputs(), mask), {"RoundAttention": 1})
    check(PASS, Given(enable_gqa=True), inputs(groups=2), {"RoundAttention": 1})


def test_a_view_that_others_read_keeps_its_cast_behind_it() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q = self.linear(x).view(x.shape[0], -1, 4, 4).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q) + q

    result = check(PASS, Reader(), (X,), {"RoundAttention": 1})
    assert any("is also used by" in refusal.reason for refusal in result.changes.refused)


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({}, torch.float64, "its inputs are torch.float64; only float32 is rounded to bfloat16"),
        ({}, torch.float16, "its inputs are torch.float16; only float32 is rounded to bfloat16"),
        ({"dropout_p": 0.1}, torch.float32, "it drops out attention weights"),
    ],
    ids=["float64", "float16", "dropout"],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    plan = PASS.plan(capture(Given(**options), inputs(dtype)))
    assert not plan.sites
    assert [refusal.reason for refusal in plan.refusals] == [reason]


def test_attention_in_bfloat16_is_left_as_it_is() -> None:
    plan = PASS.plan(capture(Given(), inputs(torch.bfloat16)))
    assert not plan.sites
    assert not plan.refusals


def test_a_device_without_bfloat16_is_refused_unless_forced() -> None:
    with pretending(Device("cpu", "Old CPU", frozenset({"avx2"}))):
        result = check(HalfAttention(), Given(), inputs(), 0)
        check(HalfAttention(force=True), Given(), inputs(), 1)
    (refusal,) = result.changes.refused
    assert refusal.reason.startswith("Old CPU has no instruction that multiplies torch.bfloat16")


def test_options_and_claim() -> None:
    assert HalfAttention().claim == Sqnr(30.0)
    assert repr(PASS) == "HalfAttention(force=True)"
    with pytest.raises(PassError) as caught:
        HalfAttention(force=1)  # type: ignore[arg-type]
    assert str(caught.value) == "HalfAttention(force=1): give True or False"


def test_prepack_writes_it_out_and_computes_each_mask_once() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x: Tensor, visible: Tensor) -> Tensor:
            for layer in self.layers:
                q = layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
                y = nn.functional.scaled_dot_product_attention(q, q, q, visible)
                x = x + y.transpose(1, 2).flatten(2)
            return x

    visible = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    visible[:, :, :, 4:] = False
    with native.without():
        opt = fxopt.transform(Layers(), [PASS, Prepack()], example_inputs=(X, visible))
    found = targets(opt.program)
    assert found.count("fxopt.written_attention.default") == 2
    assert found.count("fxopt.attention_bias.default") == 1
    assert "aten.scaled_dot_product_attention.default" not in found
    assert opt.report.steps[-1].fired["WriteOutAttention"] == 2
