"""BERT-large and a Llama-shaped block, batch 32 x 512, on a GPU: milliseconds and joules.

int8 and float8 by fxopt and by torchao beside bfloat16 under `torch.compile(mode="max-autotune")`,
in one process, in turns, every system from the same weights in bfloat16. Mixed precision by fxopt
beside `torch.autocast` under the same compiler, from weights in float32. Outputs are judged against
eager float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Effort, Record
from benchmarks.energy import joules
from benchmarks.sidebyside import Comparison, against_all, compare
from benchmarks.systems import (
    Call,
    InAutocast,
    Inputs,
    System,
    Workload,
    autocast,
    first,
    transformed,
)
from fxopt.device import Device

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
_BATCH, _LENGTH = 32, 512
_STRUCTURE = "canonicalize, fuse-linears"
# Random weights are harder than trained ones; a wrong kernel is below 0 dB.
_FLOOR_DB = {"int8": 15.0, "float8": 8.0}


def _bert_large(quick: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
    if quick:
        sizes |= {"num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, num_attention_heads=16), add_pooling_layer=False)


def _llama_block(quick: bool) -> nn.Module:
    """One layer of the sizes of Llama 3 8B, a short embedding before it."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024 if quick else 4096,
        intermediate_size=2048 if quick else 14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaModel(config)


_MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "bert_large": _bert_large,
    "llama_block": _llama_block,
}


@pytest.fixture(scope="module", params=_MODELS)
def workload(request: pytest.FixtureRequest, quick: bool) -> Workload:
    torch.manual_seed(0)
    model = _MODELS[request.param](quick).eval().cuda()
    batch, length = (2, 64) if quick else (_BATCH, _LENGTH)
    return Workload(model, {"input_ids": torch.randint(0, 1000, (batch, length)).cuda()})


def _in_bfloat16(prepare: Callable[[Workload], Call]) -> Callable[[Workload], Call]:
    """Parameters in bfloat16; buffers (rotary frequencies) keep their dtype."""

    def prepare_in_bfloat16(workload: Workload) -> Call:
        twin = copy.deepcopy(workload.model)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return prepare(replace(workload, model=twin))

    return prepare_in_bfloat16


def _compiled(config: Callable[[], Any] | None = None) -> Callable[[Workload], Call]:
    """`torch.compile(mode="max-autotune")`, after torchao's `quantize_` where it gets a config."""

    def prepare(workload: Workload) -> Call:
        if config is not None:
            from torchao.quantization import quantize_

            quantize_(workload.model, config())
        return _max_autotuned(workload.model, workload.inputs)

    return _in_bfloat16(prepare)


def _max_autotuned(model: nn.Module, inputs: Inputs) -> Call:
    import torch._inductor.config as inductor

    def run(**inputs: Tensor) -> Any:
        return model(**inputs)

    # A code object of its own: Dynamo keeps only a few compilations for each.
    run.__code__ = run.__code__.replace()
    call = torch.compile(run, fullgraph=True, dynamic=False, mode="max-autotune")
    # torchao's documentation asks for it, for its int8 products.
    with inductor.patch(force_fuse_int_mm_with_mul=True):
        call(**inputs)
    return lambda inputs: first(call(**inputs))


def _torchao_int8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _torchao_float8() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _ours(numerics: str, *, bfloat16: bool = True) -> tuple[System, ...]:
    systems = []
    for lower in ("lower", "lower{mode=max-autotune}"):
        prepare = transformed(f"{_STRUCTURE}, {numerics}, {lower}")
        name = f"fxopt {numerics}, {lower}"
        systems.append(System(name, _in_bfloat16(prepare) if bfloat16 else prepare))
    return tuple(systems)


_COMPILE_BF16 = System("torch.compile bf16, max-autotune", _compiled())
_OURS = {"int8": _ours("int8-linear"), "float8": _ours("float8-linear")}
_TORCHAO = {
    "int8": System("torchao int8 dynamic, max-autotune", _compiled(_torchao_int8), ("torchao",)),
    "float8": System(
        "torchao float8 dynamic by row, max-autotune", _compiled(_torchao_float8), ("torchao",)
    ),
}


_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_against_bfloat16_and_torchao(  # type: ignore[no-untyped-def]
    workload: Workload, dtype: str, effort: Effort, quick: bool, benchmark, record: Record
) -> None:
    _skip_unless_fast(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    ours, peers = _OURS[dtype], (_COMPILE_BF16, _TORCHAO[dtype])
    compared = _timed(benchmark, workload, (*ours, *peers), _FLOOR_DB[dtype], effort)
    figures = _figures(compared, workload, ours, peers, quick)
    benchmark.extra_info.update(figures)
    record(f"cuda_{_kind(workload)}_{dtype}", figures)


@pytest.mark.parametrize("dtype", _HALVES)
def test_mixed_precision_against_autocast(  # type: ignore[no-untyped-def]
    workload: Workload, dtype: str, effort: Effort, quick: bool, benchmark, record: Record
) -> None:
    _skip_unless_fast(_HALVES[dtype])
    ours = _ours(f"autocast{{dtype={dtype}}}", bfloat16=False)
    peers = _autocast(dtype) + ((_COMPILE_BF16,) if dtype == "bfloat16" else ())
    compared = _timed(benchmark, workload, (*ours, *peers), 30.0, effort)
    figures = _figures(compared, workload, ours, peers, quick)
    benchmark.extra_info.update(figures)
    record(f"cuda_{_kind(workload)}_autocast_{dtype}", figures)


def _autocast(dtype: str) -> tuple[System, ...]:
    half = _HALVES[dtype]

    def compiled(workload: Workload) -> Call:
        return _max_autotuned(InAutocast(workload.model, half), workload.inputs)

    return (
        System(f"torch.autocast {dtype} + torch.compile, max-autotune", compiled),
        System(f"torch.autocast {dtype} (eager)", autocast(half)),
    )


def _skip_unless_fast(dtype: torch.dtype) -> None:
    asked = Device.describe("cuda").accelerates(dtype)
    if not asked:
        pytest.skip(asked.reason)


def _timed(
    benchmark: Any, workload: Workload, systems: Sequence[System], floor_db: float, effort: Effort
) -> Comparison:
    compared: Comparison = benchmark.pedantic(
        compare, args=(workload, systems), kwargs={"floor_db": floor_db, **effort}, rounds=1
    )
    return compared


def _figures(
    compared: Comparison,
    workload: Workload,
    ours: Sequence[System],
    peers: Sequence[System],
    quick: bool,
) -> dict[str, Any]:
    return {
        "model": type(workload.model).__name__,
        "batch": list(workload.inputs["input_ids"].shape),
        "systems": compared.systems(),
        "ratios": compared.ratios(against_all(ours, peers)),
        **_energy(compared, workload, (*ours, *peers), rounds=1 if quick else 5),
    }


def _kind(workload: Workload) -> str:
    return "bert_large" if "Bert" in type(workload.model).__name__ else "llama_block"


def _energy(
    compared: Comparison, workload: Workload, systems: Sequence[System], rounds: int
) -> dict[str, Any]:
    runs = {s.name: partial(compared.calls[s.name], workload.inputs) for s in systems}
    try:
        with torch.no_grad():
            return {"joules": joules(runs, rounds)}
    except OSError as error:
        return {"joules": str(error)}
