"""The figures themselves: what the helpers of the benchmarks compute is what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.breakdown import kind_of
from benchmarks.fidelity import agreement, on_the_front, perplexity, spearman
from benchmarks.text import calibration_texts, evaluation_texts, token_windows


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_same_embeddings_agree_wholly() -> None:
    unit = torch.nn.functional.normalize(torch.randn(20, 8, dtype=torch.float64), dim=-1)
    expected = {"cosine_mean": 1.0, "cosine_min": 1.0, "spearman": 1.0, "same_neighbour": 1.0}
    assert agreement(unit, unit) == pytest.approx(expected)


def test_one_turned_embedding_shows_in_the_minimum() -> None:
    unit = torch.nn.functional.normalize(torch.randn(20, 8, dtype=torch.float64), dim=-1)
    turned = unit.clone()
    turned[3] = -turned[3]
    figures = agreement(unit, turned)
    assert figures["cosine_min"] == pytest.approx(-1.0)
    assert figures["cosine_mean"] == pytest.approx(0.9)
    assert figures["same_neighbour"] < 1.0


def test_spearman_is_blind_to_scale_but_not_to_order() -> None:
    a = torch.tensor([0.1, 0.5, 0.2, 3.0])
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.tensor([0.5, 0.1, 0.2, 3.0])) == pytest.approx(0.2)


def test_perplexity_of_equal_logits_is_the_size_of_the_vocabulary() -> None:
    windows = [torch.randint(0, 50, (1, 9)) for _ in range(3)]
    assert perplexity(lambda inputs: torch.zeros(1, 9, 50), windows) == pytest.approx(50.0)


def test_perplexity_of_a_sure_and_right_model_is_one() -> None:
    window = torch.randint(0, 50, (1, 9))
    logits = torch.zeros(1, 9, 50)
    logits[0, torch.arange(8), window[0, 1:]] = 100.0
    assert perplexity(lambda inputs: logits, [window]) == pytest.approx(1.0)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = {"fast": (1.0, 0.9), "true": (3.0, 1.0), "beaten": (3.0, 0.95), "slow": (4.0, 1.0)}
    front = {"fast": True, "true": True, "beaten": False, "slow": False}
    assert on_the_front(points) == front


def test_texts_are_distinct_and_halves_share_none() -> None:
    evaluation, calibration = evaluation_texts(), calibration_texts()
    assert len(evaluation) >= 1000
    assert len(calibration) >= 1000
    assert len(set(evaluation) | set(calibration)) == len(evaluation) + len(calibration)


def test_windows_follow_one_another() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.strip()]}

    windows = token_windows(tokenizer, ["abc", "def"], count=2, length=3)
    assert [window.tolist() for window in windows] == [[[97, 98, 99]], [[100, 101, 102]]]
    with pytest.raises(ValueError, match="have 6 tokens, not 3 windows of 3"):
        token_windows(tokenizer, ["abc", "def"], count=3, length=3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fxopt::int8_product", "products"),
        ("onednn::qlinear_pointwise", "products"),
        ("graph_0_cpp_fused__softmax_add_mul_4", "attention"),
        ("aten::bmm", "attention"),
        ("graph_0_cpp_fused_add_native_layer_norm_3", "norms, with what is fused into them"),
        ("graph_0_cpp_fused_int8_product_mul_round_5", "quantize elsewhere"),
        ("graph_0_cpp_fused_embedding_0", "other generated code"),
        ("aten::empty", None),
        ("Torch-Compiled Region: 0/0", None),
    ],
)
def test_kinds_of_kernels(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
