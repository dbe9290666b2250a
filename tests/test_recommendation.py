"""recommend: what it takes, what it leaves out, and that it says why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import ModelError, PassError, recommend
from fxopt.device import Device, pretending
from fxopt.recommendation import Advice
from fxopt.timing import Latency, summarize, timings_in

WITH_VNNI = Device("cpu", "a fast one", frozenset({"avx512_vnni", "avx512_bf16"}))
PLAIN = Device("cpu", "a plain one")
GPU = Device("cuda", "a GPU", capability=(9, 0), triton=True)

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def int8_doubles(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    """Latencies by which every kernel takes twice the time of the float one."""
    return {name: summarize([2.0 if index else 1.0] * 9) for index, name in enumerate(systems)}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Linear(32, 8)).eval()


def taken(model: nn.Module, example: Any = X, **options: Any) -> list[str]:
    return [one.spec for one in recommend(model, example, **options).taken]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Device, bool], None]]:
    with ExitStack() as test:

        def pretend(device: Device, compiler: bool = True) -> None:
            test.enter_context(pretending(device))
            monkeypatch.setattr("fxopt.recommendation.has_cpp_compiler", lambda: compiler)

        yield pretend


def test_where_int8_pays_it_ends_in_int8(machine: Any) -> None:
    machine(PLAIN)
    assert taken(mlp()) == [
        "canonicalize",
        "fuse-linears",
        "int8-linear{budget=sqnr(20)}",
        "prepack",
        "lower",
    ]
    found = recommend(mlp(), X)
    assert found.passes == fxopt.pass_list.parse_passes(found.spec)
    assert found.expect[0] == "an int8 product takes 0.50x the time at M=64, K=32, N=48 (layers: 1)"
    assert "97% of the parameters" in str(found)


def test_where_int8_does_not_pay_it_says_why(machine: Any) -> None:
    machine(PLAIN)
    with timings_in(None, int8_doubles):
        found = recommend(mlp(), X)
    assert not any(one.spec.startswith("int8") for one in found.taken)
    (int8,) = (one for one in found.left_out if one.spec == "int8-linear")
    assert int8.reason.startswith("no faster here than float32: it takes 2.00x the time at M=64, ")
    assert not found.expect
    assert "  without int8-linear: no faster here" in str(found)


def test_with_inputs_to_learn_from_int8_is_static_and_smoothed(machine: Any) -> None:
    machine(WITH_VNNI)
    assert taken(mlp(), calibrated=True)[2:] == [
        "smooth-quant{alpha=auto, mode=static}",
        "int8-linear{mode=static, budget=sqnr(20)}",
        "autocast",
        "prepack",
        "lower",
    ]


def test_few_rows_make_only_the_weights_smaller(machine: Any) -> None:
    machine(PLAIN)
    assert "int8-linear{mode=weight_only, budget=sqnr(20)}" in taken(mlp(), X[:1])


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        ({"input_ids": torch.zeros(4, 16, dtype=torch.int64)}, 64),
        (torch.zeros(2, 3, 8, 8), 2),
        ((torch.zeros(4, 5, 6), None), 20),
        (torch.zeros(6), 1),
        (None, None),
    ],
)
def test_rows_are_counted_as_linears_see_them(example: Any, rows: int | None) -> None:
    from fxopt.recommendation import _rows_of

    assert _rows_of(example) == rows


def test_a_gpu_gets_half_precision_and_no_packing(machine: Any) -> None:
    machine(GPU)
    model = mlp()
    found = recommend(model, X)
    assert "autocast" in [one.spec for one in found.taken]
    assert found.taken[-1].spec == "lower"


def test_without_a_compiler_it_is_not_lowered(machine: Any) -> None:
    machine(PLAIN, compiler=False)
    found = recommend(mlp(), X)
    assert found.taken[-1].spec == "prepack"
    assert Advice("lower", "Inductor needs a C++ compiler, and there is none") in found.left_out


def test_training_takes_what_trains(machine: Any) -> None:
    machine(WITH_VNNI)
    assert taken(mlp(), mode="train") == ["canonicalize", "autocast", "lower"]


def test_norms_and_dead_channels_are_seen(machine: Any) -> None:
    machine(PLAIN)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = 0.0
    found = recommend(model, torch.randn(2, 3, 8, 8))
    by_spec = {one.spec: one.reason for one in found.taken}
    assert by_spec["fold-pruned"] == "output channels that are zero throughout: 1"
    assert by_spec["fuse-conv-batch-norm"] == "batch norms fold into what is before them: 1"
    assert any("no linear layers of its own" in one.reason for one in found.left_out)


class Unusual(nn.Module):
    """No parameters, a forward of keywords."""

    def forward(self, *, x: Tensor) -> Tensor:
        return x.sin()


def test_any_module_gets_a_list() -> None:
    found = recommend(Unusual(), {"x": X})
    assert found.spec.startswith("canonicalize")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"needs an nn\.Module, not function"):
        recommend(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(PassError) as caught:
        recommend(mlp(), X, mode="test")  # type: ignore[arg-type]
    assert str(caught.value) == "mode='test': must be 'eval' or 'train'"


def test_auto_is_the_recommended_list_and_the_report_says_why(machine: Any) -> None:
    machine(PLAIN, compiler=False)
    lines: list[str] = []
    opt = fxopt.transform(mlp(), "auto", example_inputs=X, progress=lines.append)
    found = recommend(mlp(), X)
    assert lines[: len(found.lines())] == list(found.lines())
    assert set(found.notes()) <= set(opt.report.notes)
    done = [step.record.name for step in opt.steps]
    assert done[:3] == ["capture", "canonicalize", "fuse-linears"]
    assert "int8-linear" in done


def test_auto_takes_the_model_as_it_was_written() -> None:
    opt = fxopt.transform(mlp(), "canonicalize", example_inputs=X)
    with pytest.raises(PassError) as caught:
        fxopt.transform(opt, "auto", example_inputs=X)
    assert str(caught.value).startswith(
        'passes="auto" chooses for a model as it was written, and this one is transformed already'
    )
