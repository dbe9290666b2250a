"""What the analysis of channels finds in each architecture of the table."""

from __future__ import annotations

from collections import Counter

import pytest

from fxopt.analyses.channels import Channels, channels
from tests.architectures import ARCHITECTURES
from tests.captured import canonicalized

WITHOUT_RESIDUAL = {
    "bert",
    "distilbert",
    "roberta",
    "electra",
    "deberta-v2",
    "t5-encoder",
    "vit",
    "clip-text",
    "clip-vision",
    "whisper-encoder",
}
"""The residual stream is an output of these."""

LAYERS, FFN, HEADS = 2, 64, 4

TRANSFORMERS = [
    name
    for name in ARCHITECTURES
    if name not in ("sequential", "mlp", "cnn", "stateful", "shared-module", "tied-weights")
]


def channels_of(name: str) -> Channels:
    return channels(canonicalized(name).program)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_feed_forward_channels_and_heads_can_be_cut_in_every_layer(name: str) -> None:
    found = channels_of(name)
    cuttable = Counter(group.kind for group in found.cuttable)
    all_groups = Counter(group.kind for group in found.groups)
    hidden = [group for group in found.groups if group.kind == "ffn" and group.size >= FFN]
    assert len(hidden) == LAYERS
    assert cuttable["ffn"] == all_groups["ffn"]
    assert cuttable["heads"] == all_groups["heads"] > 0
    heads = [group for group in found.groups if group.kind in ("heads", "queries")]
    # Relative positions are shared by the layers of T5 and DeBERTa, so their heads leave together.
    per_layer = 1 if name in ("t5-encoder", "deberta-v2") else LAYERS
    assert sum(group.kind == "heads" for group in heads) == per_layer
    residual = [group for group in found.groups if group.kind == "residual"]
    assert any(group.refusals for group in residual) == (name in WITHOUT_RESIDUAL)


def test_grouped_queries_are_key_value_heads_times_queries() -> None:
    found = channels_of("llama")
    heads = found["model.layers.0.self_attn.heads"]
    queries = found["model.layers.0.self_attn.q_proj.queries"]
    assert heads.size * queries.size == HEADS
    names = {place.name for place in heads.places}
    assert names == {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert {place.name for place in queries.places} == {
        f"model.layers.0.self_attn.{p}_proj.weight" for p in "qo"
    }


def test_rotary_dimensions_leave_in_pairs_and_in_every_layer_at_once() -> None:
    group = channels_of("llama")["model.head_dim"]
    by_name = {place.name: place.positions for place in group.places}
    half = group.size
    query = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert {0, half} <= set(query[0].tolist())
    assert by_name["model.rotary_emb.inv_freq"].tolist() == [[c] for c in range(half)]
    assert any("layers.1" in name for name in by_name)


def test_experts_are_cut_through_all_experts_at_once() -> None:
    group = channels_of("mixtral")["model.layers.0.mlp.experts.ffn"]
    assert group.size == FFN
    assert not group.refusals
    positions = {place.name.split(".")[-1]: place.positions for place in group.places}
    assert positions["gate_up_proj"][0].tolist() == [0, FFN]
    assert positions["down_proj"][0].tolist() == [0]
