"""Pruned models where models go: configs, smaller models of their class, folders, other passes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from tests.architectures import ARCHITECTURES, Case
from tests.check import tensors_of

HALF = fxopt.PruneChannels(ratio=0.5, scope=("ffn", "heads"))


def pruned(name: str, *passes: object) -> tuple[Case, fxopt.Optimized]:
    case = ARCHITECTURES[name]()
    passes = passes or (HALF,)
    return case, fxopt.transform(
        case.model, ["canonicalize", *passes], example_inputs=case.example, measure_cost=False
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_the_state_of_a_pruned_model_fits_a_smaller_model_of_its_class(name: str) -> None:
    case, opt = pruned(name)
    small_size = case.model.config.intermediate_size // 2
    assert opt.config.intermediate_size == small_size
    assert opt.config.num_key_value_heads == case.model.config.num_key_value_heads // 2
    assert opt.config.num_attention_heads == case.model.config.num_attention_heads // 2
    small = type(case.model)(opt.config).eval()
    found = small.load_state_dict(opt.state_dict(), strict=False)
    assert not found.unexpected_keys
    for inputs in case.others:
        with torch.no_grad():
            expected, ours = tensors_of(small(**inputs)), tensors_of(opt(**inputs))
        for old, new in zip(expected, ours, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_a_config_without_a_place_for_fewer_heads_keeps_their_number() -> None:
    case, opt = pruned("bert")
    assert opt.config.intermediate_size == case.model.config.intermediate_size // 2
    assert opt.config.num_attention_heads == case.model.config.num_attention_heads
    assert case.model.config.intermediate_size == 64  # the model's own is untouched


def test_layers_of_different_widths_leave_the_config_alone() -> None:
    case, opt = pruned("bert", fxopt.PruneChannels(ratio=0.5, scope=("encoder.layer.0.*ffn",)))
    assert opt.config.intermediate_size == case.model.config.intermediate_size


def test_folding_keeps_the_names_of_what_took_constants_up() -> None:
    case = ARCHITECTURES["bert"]()
    with torch.no_grad():
        case.model.encoder.layer[0].intermediate.dense.weight[:16] = 0.0
    opt = fxopt.transform(case.model, [fxopt.FoldPruned()], example_inputs=case.example)
    assert opt.steps[-1].record.fired["AbsorbConstants"] == 1
    state, dense = opt.state_dict(), case.model.state_dict()
    assert state.keys() <= dense.keys()
    assert state["encoder.layer.0.output.dense.weight"].shape == (32, 48)
    assert not torch.equal(
        state["encoder.layer.0.output.dense.bias"], dense["encoder.layer.0.output.dense.bias"]
    )


def test_saved_and_loaded(tmp_path: Path) -> None:
    case, opt = pruned("llama")
    opt.save(tmp_path / "pruned")
    loaded = fxopt.load(tmp_path / "pruned")
    assert loaded.config.intermediate_size == opt.config.intermediate_size
    for old, new in zip(
        tensors_of(opt(**case.example)), tensors_of(loaded(**case.example)), strict=True
    ):
        assert torch.equal(old, new)
    again = fxopt.transform(loaded, [HALF], example_inputs=case.example)
    assert not again.steps[-1].record.fired
    assert "cut from" in again.steps[-1].record.refused[0].reason


@pytest.mark.parametrize(
    "after",
    [
        "fuse-linears, int8-linear{where=always}",
        "fuse-linears, autocast{dtype=bfloat16, device=cpu:avx512_bf16}",
    ],
)
def test_other_passes_take_a_pruned_model(after: str) -> None:
    case, opt = pruned("bert", HALF, after)
    assert all(step.record.holds for step in opt.steps)
    assert opt.steps[-1].record.fired
    for inputs in case.others:
        assert type(opt(**inputs)) is type(case.model(**inputs))


def test_the_original_is_untouched_and_uncut_tensors_are_shared() -> None:
    case = ARCHITECTURES["bert"]()
    before = copy.deepcopy(case.model.state_dict())
    opt = fxopt.transform(case.model, ["canonicalize", HALF], example_inputs=case.example)
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    shared = dict(opt.named_parameters())["embeddings.word_embeddings.weight"]
    assert shared is case.model.embeddings.word_embeddings.weight


def test_a_pruned_model_trains() -> None:
    case = ARCHITECTURES["bert-sequence-classification"]()
    opt = fxopt.transform(
        case.model, ["canonicalize", HALF], example_inputs=case.example, mode="train"
    )
    dense = sum(parameter.numel() for parameter in case.model.parameters())
    assert sum(parameter.numel() for parameter in opt.parameters()) < 0.7 * dense
    optimizer = torch.optim.AdamW(opt.parameters(), lr=1e-2)
    target = torch.zeros(case.example["input_ids"].shape[0], dtype=torch.int64)
    losses = []
    opt.eval()
    for _ in range(5):
        opt.train()
        loss = nn.functional.cross_entropy(opt(**case.example).logits, target)
        loss.backward()
        assert all(parameter.grad is not None for parameter in opt.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    opt.eval()
    with torch.no_grad():
        assert opt(**case.example).logits.shape[0] == len(target)
