"""What writing text costs: what is timed, on what, and what is only said."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.errors import MeasureError
from fxopt.measurement import Ceilings, Energy, Generation, Measurement, Unmeasured, measure_all
from fxopt.measurement.reading import TextReader, cache_bytes, why_unreadable
from fxopt.measurement.writing import Task, Writer
from tests.generation.language_models import language_model, original, shared, text

measuring = sys.modules["fxopt.measurement.measuring"]
QUICK = {"repeats": 3, "seconds": 0.02, "count": False, "energy": False}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fxopt.measurement.energy"], "_ESTIMATE_WINDOW", 0.02)
    limits = Ceilings("cpu", {"float32": 1e11}, 1e10)
    monkeypatch.setattr(measuring, "ceilings", lambda device: limits)


def prompt(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = text(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model, inputs=None, **options) -> Generation:  # type: ignore[no-untyped-def]
    found = fxopt.measure(model, inputs or prompt(), **{**QUICK, "new_tokens": 3, **options})
    assert found.generation is not None, found.reasons
    return found.generation


def test_both_kinds_of_model_are_measured_in_turns() -> None:
    model, opt = shared("Llama")
    found = measure_all({"a": model, "b": opt}, prompt(), **QUICK, new_tokens=3, contexts=(0, 9))
    for one in found.values():
        writing = one.generation
        assert writing is not None
        assert (writing.rows, writing.prompt_tokens, writing.new_tokens) == (2, 5, 3)
        assert writing.prompt_tokens_per_second == 10 * 1e3 / writing.first_token.median
        assert [each.context for each in writing.decoding] == [0, 9]
        for each in writing.decoding:
            assert each.tokens_per_second == pytest.approx(2e3 / each.latency.median)
            assert each.energy == Unmeasured("energy=False")
        # The sample is that of all steps, and a step its share of it.
        assert writing.whole.median > 2 * min(writing.decoding[0].latency.samples)
        # 2 layers x keys and values x 2 heads x 8 entries x 4 bytes
        assert writing.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4


def test_nothing_is_written_unless_asked() -> None:
    found = fxopt.measure(original("Llama"), prompt(), **QUICK)
    assert found.generation is None
    assert "generation" not in found.reasons
    assert "first token" not in str(found)


def test_padding_is_no_token_of_the_prompt() -> None:
    padded = prompt()
    padded["attention_mask"][0, :3] = 0
    found = written(shared("Llama")[1], padded)
    assert found.prompt_tokens_per_second == 7 * 1e3 / found.first_token.median


def test_joules_are_shared_by_the_tokens_of_all_rows() -> None:
    options = {"energy": True, "estimate": True, "watts": 10.0}
    spent = written(shared("Llama")[1], **options).decoding[0].energy
    assert isinstance(spent, Energy)
    assert spent.tokens == 6
    assert spent.joules_per_token == spent.joules.median / 6


def test_it_is_shown_and_written_as_json() -> None:
    options = {**QUICK, "energy": True, "estimate": True, "watts": 10.0}
    found = fxopt.measure(shared("Llama")[1], prompt(), **options, new_tokens=2, contexts=(4,))
    shown = str(found)
    for part in (
        "first token",
        "of 2 x 5 tokens",
        "behind 4",
        "a step; ESTIMATED ",
        "J a token",
        "for 2 tokens",
        "cache          256 B a token",
    ):
        assert part in shown
    assert Measurement.from_json(found.to_json()) == found


@given(context=st.integers(0, 9), new=st.integers(2, 4), optimised=st.booleans())
def test_steps_are_those_of_generate_and_leave_the_context(
    context: int, new: int, optimised: bool
) -> None:
    """Timed again and again, the same tokens come: nothing of a sample stays in the cache."""
    model = shared("Llama")[optimised]
    task = Task(text(1, 4), torch.ones(1, 4, dtype=torch.bool), new, (context,))
    steps = Writer(model, task).behind(context)
    with torch.no_grad():
        last = [int(steps()) for _ in range(3)]
        start = torch.cat([task.context(context), task.ids[:, :1]], 1)
        whole = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=new, do_sample=False
        )
    assert last == [int(whole[0, -1])] * 3


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), optimised=st.booleans())
def test_a_reader_reads_as_the_model_reads_at_once(lengths: list[int], optimised: bool) -> None:
    model = shared("Llama")[optimised]
    ids = text(2, sum(lengths))
    reader = TextReader(model)
    with torch.no_grad():
        read = torch.cat([reader.read(part) for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(read, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert cache_bytes(reader.cache) == 2 * sum(lengths) * 256


def test_what_several_programs_hold_counts_once() -> None:
    opt = shared("Llama")[1]
    assert len(opt.programs) > 1
    found = fxopt.measure(opt, prompt(), **QUICK)
    assert found.parameter_bytes == opt.program.parameter_bytes()


def test_the_work_of_a_call_is_that_of_its_step() -> None:
    model, opt = shared("Llama")
    plain, same = (
        fxopt.measure(one, prompt(), **{**QUICK, "count": True}).flops for one in (model, opt)
    )
    assert plain is not None
    assert same is not None
    assert plain <= same < 1.1 * plain


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Linear(3, 3),
            "only a causal language model of transformers and what fxopt.transform "
            "makes of it write text, and Linear is neither",
        ),
        (lambda **_: torch.zeros(2, 5), "and function is neither"),
    ],
)
def test_what_writes_no_text_is_told(model, reason: str) -> None:  # type: ignore[no-untyped-def]
    assert reason in str(why_unreadable(model))


def test_a_graph_of_single_calls_says_how_it_would_write() -> None:
    single = fxopt.transform(original("Llama"), "canonicalize", example_inputs=prompt())
    found = fxopt.measure(single, prompt(), **QUICK, new_tokens=2)
    assert found.generation is None
    assert (
        "transformed without example_inputs, or with generation=True"
        in (found.reasons["generation"])
    )


def test_encoder_decoders_are_told() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32)
    reason = why_unreadable(T5ForConditionalGeneration(config))
    assert reason == (
        "T5ForConditionalGeneration has an encoder, and only decoders alone are read so far"
    )


def test_a_model_that_raises_is_told_and_the_others_are_measured() -> None:
    broken = language_model("Llama")
    forward = broken.forward

    def refusing(*args, **options):  # type: ignore[no-untyped-def]
        if options.get("past_key_values") is not None:
            raise RuntimeError("no cache for you\nand more")
        return forward(*args, **options)

    broken.forward = refusing
    found = measure_all(
        {"broken": broken, "whole": original("Llama")}, prompt(), **QUICK, new_tokens=2
    )
    assert found["broken"].reasons["generation"] == "RuntimeError: no cache for you"
    assert found["whole"].generation is not None


def test_contexts_beyond_the_positions_are_told() -> None:
    found = fxopt.measure(original("Llama"), prompt(), **QUICK, new_tokens=4, contexts=(0, 125))
    assert found.reasons["generation"] == "the model has 128 positions, and 129 are asked for"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 1}, "new_tokens=1: give how many tokens are written, at least 2"),
        ({"new_tokens": 2.0}, "new_tokens=2.0: give how many"),
        ({"new_tokens": 2, "contexts": ()}, r"contexts=\(\): give how many tokens the cache holds"),
        ({"new_tokens": 2, "contexts": (0, -1)}, r"contexts=\(0, -1\): give how many"),
        ({"contexts": (0, 8)}, r"contexts=\(0, 8\) without new_tokens=: say how many tokens"),
    ],
)
def test_numbers_out_of_range_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        fxopt.measure(original("Llama"), prompt(), **QUICK, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        ({**prompt(), "position_ids": text(2, 5)}, "position_ids"),
        ({"input_ids": torch.zeros(2, 5)}, "other tensors"),
    ],
)
def test_inputs_that_are_no_text_are_told(inputs, given: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MeasureError, match=f"inputs must be text, .* token by token, not {given}"):
        fxopt.measure(original("Llama"), inputs, **QUICK, new_tokens=2)
