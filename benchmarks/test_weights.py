"""Perplexity of SmolLM2-135M with weights of fewer bits, over 32 windows of 256 tokens of text.

The file that the model comes from holds four bits a weight in affine groups (Q4_1), which the same
form takes over as they are. So there is a second table, of an equal model whose weights lie on no
such grid: channels between two linears are scaled by drawn factors in the one, and back in the
other.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from benchmarks.conftest import Record
from benchmarks.fidelity import perplexity
from benchmarks.models import Language, Prefill, smollm2

_LENGTH, _WINDOWS = 256, 32
_INT8 = "int8-linear{{mode=weight_only, tied=True, where=always, {}}}, int8-embedding"
_LISTS = {
    "half, rounded": "half-linear{weight_only=True, lossless=False}",
    "int8, a scale a row": _INT8.format("range=8"),
    "int8, groups of 32": _INT8.format("group=32"),
    "int4 affine, groups of 32, head int8": (
        f"{_INT8.format('group=32, include=*lm_head')}, int4-linear{{scheme=affine}}"
    ),
    "int4 symmetric, groups of 32, head int8": (
        f"{_INT8.format('group=32, include=*lm_head')}, int4-linear{{group=32, claim=sqnr(1)}}"
    ),
}
_OFF_THE_GRID = tuple(_LISTS)[2:]


@pytest.fixture(scope="module")
def language(quick: bool) -> Language:
    return smollm2(64 if quick else _LENGTH, quick=quick, judged=_WINDOWS)


def test_perplexity_of_weights(language: Language, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Each list over float32, and bytes of weights; then on weights off the grid."""
    figures: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "weights": "of a GGUF file in Q4_1: linears lie on an affine grid of four bits a group",
        "windows": len(language.evaluation),
        "length": language.evaluation[0].shape[1],
    }
    figures |= benchmark.pedantic(_table, args=(language, language.model, _LISTS), rounds=1)
    scaled = _off_the_grid(language.model)
    figures["channels scaled, off the grid"] = _table(
        language, scaled, {name: _LISTS[name] for name in _OFF_THE_GRID}
    )
    benchmark.extra_info.update(figures)
    record("smollm2_weights", figures)


def _table(language: Language, model: nn.Module, lists: dict[str, str]) -> dict[str, Any]:
    # By twos: transformers takes another branch for one row alone.
    windows = [
        torch.cat(pair)
        for pair in zip(language.evaluation[::2], language.evaluation[1::2], strict=True)
    ]
    reads = Prefill(model, 0).eval()
    with torch.no_grad():
        original = perplexity(lambda inputs: reads(**inputs), windows)
        rows = {}
        for name, passes in lists.items():
            opt = fxopt.transform(
                reads,
                f"canonicalize, fuse-linears, {passes}, select-kernels",
                example_inputs={"input_ids": windows[0]},
                verify=False,
            )
            found = perplexity(lambda inputs, opt=opt: opt(**inputs), windows)
            rows[name] = {
                "perplexity": round(found, 4),
                "over_fp32": round(found / original, 5),
                "megabytes": round(opt.program.parameter_bytes() / 1e6, 1),
            }
    return {"perplexity of fp32": round(original, 4), "lists": rows}


def _off_the_grid(model: nn.Module) -> nn.Module:
    """An equal model: W2 (W1 x) = (W2 / c) (c W1 x), and so with the weight of a norm for W1."""
    scaled: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> Tensor:
        return torch.randn(count, generator=generator).mul(0.3).exp()

    with torch.no_grad():
        for layer in scaled.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                by = factors(len(norm.weight))
                norm.weight.mul_(by)
                for reader in readers:
                    reader.weight.div_(by)
            by = factors(len(attention.v_proj.weight))
            attention.v_proj.weight.mul_(by[:, None])
            heads = by.view(-1, attention.head_dim)
            heads = heads.repeat_interleave(attention.num_key_value_groups, 0)
            attention.o_proj.weight.div_(heads.flatten())
            by = factors(len(mlp.up_proj.weight))
            mlp.up_proj.weight.mul_(by[:, None])
            mlp.down_proj.weight.div_(by)
    return scaled  # type: ignore[no-any-return]
