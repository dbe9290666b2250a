"""An optimised language model in the place of the original: generate, calls, pipelines, files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import fxopt
from fxopt.calls import CACHE_NAMES
from fxopt.errors import InputError, ModelError, PassError
from fxopt.generation.cache import CACHE
from tests.generation.language_models import FAMILIES, VOCAB, language_model, shared, text, words

PADDED = {
    "input_ids": text(2, 7),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]),
}
GREEDY = {"max_new_tokens": 9, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams that are sampled": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunks": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


def both(model: Any, opt: Any, **call: Any) -> tuple[Any, Any]:
    """What the original and the result generate."""
    found = []
    for one in (model, opt):
        torch.manual_seed(0)
        found.append(one.generate(**{**GREEDY, **call}))
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_the_original_writes(family: str) -> None:
    model, opt = shared(family)
    assert torch.equal(*both(model, opt, **PADDED))
    assert torch.equal(*both(model, opt, **PADDED, num_beams=2))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate(mode: str) -> None:
    model, opt = shared("Llama")
    assert torch.equal(*both(model, opt, **PADDED, **MODES[mode]))


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2"])
@pytest.mark.parametrize("mask", ["0011111", "1111100", "0110111"])
def test_positions_that_a_call_leaves_out_are_those_of_the_original(family: str, mask: str) -> None:
    model, opt = shared(family)
    call = {
        "input_ids": text(2, 7),
        "attention_mask": torch.tensor([list(map(int, mask)), [1] * 7]),
    }
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(opt(**call).logits[kept], model(**call).logits[kept])


def test_positions_that_nobody_knows_are_asked_for() -> None:
    _, opt = shared("Llama")
    twin = copy.deepcopy(opt)
    twin._carried["_positions_without_ids"] = "unknown"
    with pytest.raises(InputError, match=r"padding ahead of text, .* give position_ids"):
        twin(**PADDED)
    right = {"input_ids": text(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.testing.assert_close(twin(**right).logits, opt(**right).logits)


def test_two_programs_read_everything() -> None:
    model, opt = shared("Llama")
    for rows, length in ((1, 1), (1, 5), (3, 1), (3, 4), (1, 70)):
        assert torch.equal(*both(model, opt, input_ids=text(rows, length)))
    assert [tuple(one.example[0].shape) for one in opt.programs] == [(2, 18), (2, 1)]


def test_assisted_decoding_either_way() -> None:
    model, opt = shared("Llama")
    call = {"input_ids": text(1, 8)}
    wanted = model.generate(**call, **GREEDY)
    for left, right in ((opt, model), (model, opt)):
        assert torch.equal(left.generate(**call, **GREEDY, assistant_model=right), wanted)
    assert torch.equal(*both(model, opt, **call, prompt_lookup_num_tokens=2))


def test_logits_and_a_dictionary() -> None:
    model, opt = shared("Gemma2")
    options = {"return_dict_in_generate": True, "output_logits": True}
    wanted, found = both(model, opt, **PADDED, **options)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()


@pytest.mark.parametrize("kind", ["own", "dynamic", "static"])
def test_text_goes_on_behind_a_cache_that_the_user_keeps(kind: str) -> None:
    model, opt = shared("Llama")
    ids = text(1, 30)
    caches: dict[str, Any] = {
        "own": None,
        "dynamic": DynamicCache(),
        "static": StaticCache(config=model.config, max_cache_len=64),
    }
    first = opt(ids[:, :10], past_key_values=caches[kind])
    second = opt(ids[:, 10:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), model(ids).logits)
    if kind != "own":
        assert second.past_key_values is caches[kind]
        assert int(caches[kind].get_seq_length()) == 30


def test_the_cache_of_the_original_is_gone_on_from() -> None:
    model, opt = shared("Qwen3")
    ids = text(2, 12)
    cache = model(ids[:, :7], use_cache=True).past_key_values
    found = opt(ids[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids).logits[:, 7:])


def test_calls_without_a_cache() -> None:
    model, opt = shared("Llama")
    ids = text(2, 6)
    output = opt(ids, use_cache=False)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, model(ids).logits)
    torch.testing.assert_close(opt(ids, return_dict=False)[0], model(ids).logits)
    for keep in (1, 2, torch.tensor([0, 4]), torch.tensor([-1])):
        wanted = model(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(opt(ids, logits_to_keep=keep).logits, wanted)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "OPT"])
@given(st.data())
def test_any_order_of_reading_equals_the_whole_text(family: str, data: st.DataObject) -> None:
    """Chunks, crops, rows reordered and repeated, padding at the beginning."""
    model, opt = shared(family)
    reading = _Reading(opt, data.draw(st.integers(1, 3), "rows"))
    for step in range(data.draw(st.integers(1, 6), "steps")):
        kind = data.draw(st.sampled_from(["many", "one", "crop", "reorder", "repeat"]))
        rows, length = reading.ids.shape
        if kind == "crop" and length > 1:
            reading.crop(data.draw(st.integers(1, length - 1), "cropped"))
        elif kind == "reorder" and length:
            orders = st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)
            reading.reorder(torch.tensor(data.draw(orders, "order")))
        elif kind == "repeat" and length and rows < 3:
            reading.repeat()
        else:
            count = 1 if kind == "one" else data.draw(st.integers(1, 40), "length")
            padded = [data.draw(st.integers(0, count - 1)) for _ in range(rows if not step else 0)]
            if length + count <= 100:
                reading.read(text(rows, count, step), padded)
    wanted = model(
        reading.ids,
        attention_mask=reading.seen,
        position_ids=reading.positions,
        use_cache=False,
    ).logits
    kept = reading.seen.bool()
    torch.testing.assert_close(reading.logits[kept], wanted[kept], rtol=1e-4, atol=1e-4)


class _Reading:
    """Text that was read bit by bit: ids, what of it is seen, and the logits."""

    def __init__(self, opt: Any, rows: int) -> None:
        self.opt, self.cache = opt, None
        self.ids = self.seen = torch.zeros(rows, 0, dtype=torch.int64)
        self.logits = torch.zeros(rows, 0, VOCAB)

    @property
    def positions(self) -> Tensor:
        return (self.seen.cumsum(-1) - 1).clamp(min=0)

    def read(self, ids: Tensor, padded: list[int]) -> None:
        seen = torch.ones_like(ids)
        for row, count in enumerate(padded):
            seen[row, :count] = 0
        self.ids, self.seen = torch.cat([self.ids, ids], 1), torch.cat([self.seen, seen], 1)
        output = self.opt(
            ids,
            attention_mask=self.seen,
            position_ids=self.positions[:, -ids.shape[1] :],
            past_key_values=self.cache,
        )
        self.cache, self.logits = (
            output.past_key_values,
            torch.cat([self.logits, output.logits], 1),
        )

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.ids, self.seen = self.ids[:, :-count], self.seen[:, :-count]
        self.logits = self.logits[:, :-count]

    def reorder(self, order: Tensor) -> None:
        self.cache.reorder_cache(order)
        self.ids, self.seen, self.logits = self.ids[order], self.seen[order], self.logits[order]

    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.ids, self.seen, self.logits = (
            one.repeat_interleave(2, 0) for one in (self.ids, self.seen, self.logits)
        )


def test_saved_loaded_copied_and_pickled(tmp_path: Path) -> None:
    model, opt = shared("Llama")
    opt.save(tmp_path / "saved")
    pickled = pickle.loads(pickle.dumps(opt))
    for twin in (fxopt.load(tmp_path / "saved"), copy.deepcopy(opt), pickled):
        assert torch.equal(*both(model, twin, **PADDED, num_beams=2))
        assert twin.generation_config.pad_token_id == 0


def test_further_passes_reach_both_programs() -> None:
    model, opt = shared("Llama")
    further = fxopt.transform(opt, "fuse-linears")
    assert torch.equal(*both(model, further, **PADDED))
    assert _linears(opt) == [15, 15]
    assert _linears(further) == [9, 9]


def _linears(opt: Any) -> list[int]:
    """How many linear layers each program has."""
    linear = torch.ops.aten.linear.default
    return [sum(node.target is linear for node in one.graph.nodes) for one in opt.programs]


def test_int8_is_judged_token_by_token() -> None:
    opt = fxopt.transform(language_model("Llama"), "int8-linear{mode=weight_only, where=always}")
    for program in opt.programs:
        assert any(t.dtype == torch.int8 for t in program.materialized().state.values())
    (note,) = [note for note in opt.report.notes if note.startswith("generation:")]
    assert "72 positions of text that the original wrote, 24 of them read one by one" in note
    assert opt.generate(text(1, 5), **GREEDY).shape == (1, 14)


def test_what_pruning_leaves_is_measured() -> None:
    opt = fxopt.transform(language_model("Llama"), "prune-channels{ratio=0.5, scope=ffn}")
    (note,) = [note for note in opt.report.notes if note.startswith("generation:")]
    assert "logits" in note
    assert opt.generate(text(1, 5), **GREEDY).shape == (1, 14)


def test_calibration_and_examples_are_texts() -> None:
    mask = torch.ones(2, 9, dtype=torch.int64)
    texts = [{"input_ids": text(2, 9, seed), "attention_mask": mask} for seed in range(3)]
    opt = fxopt.transform(
        language_model("Llama"),
        "int8-linear{mode=static, where=always}",
        example_inputs=PADDED,
        verify_inputs=texts[:1],
        calibration=texts,
        generation=True,
        verify=False,
    )
    assert opt.generate(**PADDED, **GREEDY).shape == (2, 16)


def test_a_pipeline_writes_text() -> None:
    model, opt = shared("Llama")
    answers = [
        transformers.pipeline("text-generation", model=one, tokenizer=words())("w5 w6 w7", **GREEDY)
        for one in (model, opt)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": text(1, 4)}, "a step computes no loss from labels"),
        ({"output_attentions": True}, "this call gives output_attentions, which a step doesn't"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must be .* \(1, 4\) in this call"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "masks of every pair of tokens aren't taken"),
    ],
)
def test_what_no_step_computes_is_said(call: dict[str, Any], message: str) -> None:
    _, opt = shared("Llama")
    with pytest.raises(InputError, match=message):
        opt(text(1, 4), **call)


def test_a_cache_has_either_of_two_names() -> None:
    _, opt = shared("Llama")
    ids = text(1, 9)
    wanted = opt(ids).logits[:, 5:]
    for name in CACHE_NAMES:
        cache = opt(ids[:, :5])[CACHE]
        found = opt(ids[:, 5:], **{name: cache})
        torch.testing.assert_close(found.logits, wanted)
        assert found[CACHE] is cache
    message = "gives past_key_values and cache, which are one: leave one out"
    with pytest.raises(InputError, match=message):
        opt(ids, past_key_values=DynamicCache(), cache=DynamicCache())


def test_other_inputs_are_refused() -> None:
    model, opt = shared("Mistral")
    with pytest.raises(InputError, match="a step reads input_ids, not inputs_embeds"):
        opt(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(InputError, match=r"input_ids must be \[batch, length\] with an entry"):
        opt(text(1, 0))
    with pytest.raises(InputError, match="cache_implementation='quantized'"):
        opt.generate(text(1, 4), **GREEDY, cache_implementation="quantized")
    windowed = DynamicCache(config=model.config)
    model(text(1, 20), past_key_values=windowed)
    with pytest.raises(InputError, match="keeps the last 3 of 20 slots of a layer"):
        opt(text(1, 1), past_key_values=windowed)


def test_what_cant_generate_is_told() -> None:
    model = language_model("Llama")
    with pytest.raises(PassError, match=r"generation=True needs .* and Linear doesn't"):
        fxopt.transform(torch.nn.Linear(2, 2), "canonicalize", generation=True)
    with pytest.raises(PassError, match="generation=True is for mode='eval'"):
        fxopt.transform(model, "canonicalize", generation=True, mode="train")
    labelled = {"input_ids": text(1, 4), "labels": text(1, 4)}
    with pytest.raises(InputError, match="a model that generates is given text"):
        fxopt.transform(model, "canonicalize", example_inputs=labelled, generation=True)
    with pytest.raises(InputError, match="the text has 2 tokens"):
        fxopt.transform(model, "canonicalize", example_inputs=text(1, 2), generation=True)


def test_a_family_without_steps_is_captured_for_single_calls() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB)
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ModelError, match=r"step by step|attention interface"):
        fxopt.transform(model, "canonicalize", generation=True)
    opt = fxopt.transform(model, "canonicalize")
    assert any(note.startswith("this module doesn't generate") for note in opt.report.notes)
    assert not hasattr(opt, "generate")


def test_one_call_without_a_cache_as_before() -> None:
    model = language_model("Llama")
    opt = fxopt.transform(model, "canonicalize", generation=False)
    assert not hasattr(opt, "generate")
    torch.testing.assert_close(opt(**PADDED).logits, model(**PADDED).logits)
