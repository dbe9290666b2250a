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
from benchmarks.systems.gguf_files import as_stored

_LENGTH, _WINDOWS, _CALIBRATING = 256, 32, 16
_INT8 = "int8-linear{{mode=weight_only, tied=True, where=always, {}}}, int8-embedding"
_HEAD = f"{_INT8.format('group=32, include=*lm_head')}, "
_AFFINE = {
    f"int4 affine, {weights}, groups of 32, head int8": (
        f"int4-linear{{scheme=affine, weights={weights}}}"
    )
    for weights in ("nearest", "hqq", "weighted", "awq", "gptq", "awq-gptq")
}
_LISTS = {
    "half, rounded": "half-linear{weight_only=True, lossless=False}",
    "int8, a scale a row": _INT8.format("range=8"),
    "int8, groups of 32": _INT8.format("group=32"),
    "int4 symmetric, groups of 32, head int8": (f"{_HEAD}int4-linear{{group=32, claim=sqnr(1)}}"),
    **{name: _HEAD + of for name, of in _AFFINE.items()},
}
_OFF_THE_GRID = (*tuple(_LISTS)[2:],)
_LARGER_GROUPS = {
    f"int4 affine, {weights}, groups of {group}, head int8": (
        f"{_HEAD}int4-linear{{scheme=affine, weights={weights}, group={group}}}"
    )
    for weights, group in (("gptq", 64), ("awq-gptq", 64), ("gptq", 192))
}
"""Both widths of the model, 576 and 1536, are multiples of 64 and 192, and not of 128."""

_PEERS = ("Q4_0", "Q4_1", "Q4_K_M")
_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What llama.cpp calls the linears of a layer."""


@pytest.fixture(scope="module")
def language(quick: bool) -> Language:
    return smollm2(64 if quick else _LENGTH, quick=quick, judged=_WINDOWS, calibrating=_CALIBRATING)


def test_perplexity_of_weights(language: Language, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Each list over float32, and bytes of weights; then on weights off the grid."""
    figures: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "weights": "of a GGUF file in Q4_1: linears lie on an affine grid of four bits a group",
        "windows": len(language.evaluation),
        "length": language.evaluation[0].shape[1],
        "windows that calibrate": len(language.calibration),
    }
    figures |= benchmark.pedantic(_table, args=(language, language.model, _LISTS), rounds=1)
    scaled = _off_the_grid(language.model)
    figures["channels scaled, off the grid"] = _table(
        language, scaled, {name: _LISTS[name] for name in _OFF_THE_GRID} | _LARGER_GROUPS
    )
    turned = _turned(language.model)
    figures["hidden states turned, off the grid"] = _table(
        language, turned, {name: _LISTS[name] for name in _OFF_THE_GRID}
    )
    figures["channels scaled, off the grid"]["peers"] = _peers(language, scaled)
    benchmark.extra_info.update(figures)
    record("smollm2_weights", figures)


def _table(language: Language, model: nn.Module, lists: dict[str, str]) -> dict[str, Any]:
    # By twos: transformers takes another branch for one row alone.
    windows = _by_twos(language.evaluation)
    calibration = [{"input_ids": ids} for ids in _by_twos(language.calibration)]
    reads = Prefill(model, 0).eval()
    with torch.no_grad():
        original = perplexity(lambda inputs: reads(**inputs), windows)
        rows = {}
        for name, passes in lists.items():
            opt = fxopt.transform(
                reads,
                f"canonicalize, fuse-linears, {passes}, select-kernels",
                example_inputs={"input_ids": windows[0]},
                calibration=calibration,
                verify=False,
            )
            found = perplexity(lambda inputs, opt=opt: opt(**inputs), windows)
            rows[name] = {
                "perplexity": round(found, 4),
                "over_fp32": round(found / original, 5),
                "megabytes": round(opt.program.parameter_bytes() / 1e6, 1),
            }
    return {"perplexity of fp32": round(original, 4), "lists": rows}


@torch.no_grad()
def _turned(model: nn.Module) -> nn.Module:
    """An equal model whose hidden states are turned by a drawn rotation R: no scale of channels
    leads back to the grid.

    The weight of each norm goes into what reads it, since x / rms(x) turns with x: then
    W (R y) = (W R) y for readers and y = Rᵀ (W x) for writers. Source: Ashkboos et al., "SliceGPT",
    ICLR 2024.
    """
    turned: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    size = turned.config.hidden_size
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q

    def set_to(parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value.to(parameter.dtype))

    def read(norm: nn.Module, readers: list[nn.Module]) -> None:
        for reader in readers:
            set_to(reader.weight, reader.weight.double() * norm.weight.double() @ rotation)
        norm.weight.fill_(1.0)

    head, table = turned.lm_head, turned.model.embed_tokens
    head.weight = nn.Parameter(head.weight.clone())  # the last norm goes into the head alone
    turned.config.tie_word_embeddings = False
    set_to(table.weight, table.weight.double() @ rotation)
    for layer in turned.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        read(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        read(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        for writer in (attention.o_proj, mlp.down_proj):
            set_to(writer.weight, rotation.T @ writer.weight.double())
    read(turned.model.norm, [head])
    return turned  # type: ignore[no-any-return]


@torch.no_grad()
def _peers(language: Language, model: nn.Module) -> dict[str, Any]:
    """The weights that llama.cpp's files would hold, multiplied in float32.

    Its own products round activations to 8 bits as well; this is what the weights alone cost.
    """
    windows = _by_twos(language.evaluation)
    reads = Prefill(model, 0).eval()
    original = perplexity(lambda inputs: reads(**inputs), windows)
    found = {}
    for weights in _PEERS:
        stored: Any = copy.deepcopy(model)
        layers, size = len(stored.model.layers), 0
        named = [("token_embd.weight", stored.model.embed_tokens)]
        for index, layer in enumerate(stored.model.layers):
            for path, name in _GGUF.items():
                named.append((f"blk.{index}.{name}.weight", layer.get_submodule(path)))
        for name, module in named:
            values, count = as_stored(weights, name, module.weight.numpy(), layers)
            module.weight.copy_(torch.from_numpy(values))
            size += count
        reads = Prefill(stored, 0).eval()
        value = perplexity(lambda inputs, reads=reads: reads(**inputs), windows)
        found[weights] = {
            "perplexity": round(value, 4),
            "over_fp32": round(value / original, 5),
            "megabytes": round(size / 1e6, 1),
        }
    return found


def _by_twos(windows: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(windows[::2], windows[1::2], strict=True)]


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
