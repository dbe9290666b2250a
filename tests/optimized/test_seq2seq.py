"""An optimised encoder-decoder in the place of the original: generate, calls, caches, files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import fxopt
import fxopt.optimized.seq2seq as seq2seq
from fxopt.errors import InputError, ModelError, SaveError
from fxopt.generation import generation_plan
from tests.generation.language_models import VOCAB, text
from tests.generation.seq2seq_models import FAMILIES, seq2seq_model, shared, source

GREEDY = {"max_new_tokens": 9, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams that are sampled": {"num_beams": 2, "do_sample": True},
    "beams of which some are returned": {"num_beams": 4, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "a beginning": {"decoder_input_ids": text(2, 5)},
    "a padded beginning": {
        "decoder_input_ids": text(2, 5),
        "decoder_attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
    },
}
TEXTS = [family for family in FAMILIES if family != "Whisper"]


def both(model: Any, opt: Any, **call: Any) -> tuple[Any, Any]:
    """What the original and the result generate."""
    found = []
    for one in (model, opt):
        torch.manual_seed(0)
        found.append(one.generate(**{**GREEDY, **call}))
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(2, 9), (1, 1), (1, 18), (3, 30)])
def test_every_family_writes_what_the_original_writes(family: str, size: tuple[int, int]) -> None:
    model, opt = shared(family)
    given = source(family, *size)
    assert torch.equal(*both(model, opt, **given))
    assert torch.equal(*both(model, opt, **given, num_beams=3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["Marian", "T5"])
def test_every_mode_of_generate(family: str, mode: str) -> None:
    model, opt = shared(family)
    assert torch.equal(*both(model, opt, **source(family), **MODES[mode]))


def test_four_programs_do_all() -> None:
    _, opt = shared("T5")
    shapes = [tuple(one.example[0].shape) for one in opt.programs]
    assert shapes == [(2, 18), (2, 1), (2, 16), (2, 16, 32)]
    names = [set(one.signature.names) for one in opt.programs]
    assert names[2:] == [{"source", "source_seen"}, {"hidden"}]
    assert names[0] == names[1] >= {"input_ids", "cross_seen", "cross_keys", "keys"}


def test_the_encoder_runs_once_and_so_do_keys_and_values_of_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, opt = shared("BART")
    counted: dict[str, int] = {}
    ask = seq2seq.Seq2SeqGenerating._ask

    def counting(self: Any, kind: str, **given: Any) -> Any:
        counted[kind] = counted.get(kind, 0) + 1
        return ask(self, kind, **given)

    monkeypatch.setattr(seq2seq.Seq2SeqGenerating, "_ask", counting)
    opt.generate(**source("BART"), **GREEDY, num_beams=2)
    assert counted == {"source": 1, "hidden": 1, "one": 9}


def test_sources_of_other_sizes_than_the_programs_get_programs_of_their_own() -> None:
    model = seq2seq_model("BART")
    opt = fxopt.transform(
        model, "canonicalize", example_inputs=source("BART", 2, 1), generation=True
    )
    assert torch.equal(*both(model, opt, **source("BART", 2, 1)))
    assert len(opt.programs) == 4
    assert torch.equal(*both(model, opt, **source("BART", 2, 9)))
    assert len(opt.programs) == 7
    with pytest.raises(InputError, match="captured with the arguments"):
        fxopt.Optimized.forward(opt, hidden=torch.zeros(2, 9, 32), keep=torch.arange(1))


def test_what_answered_last_is_asked_first_while_it_is_right() -> None:
    model = seq2seq_model("BART")
    opt = fxopt.transform(model, "int8-linear{mode=weight_only, where=always}")
    opt.generate(**source("BART"), **GREEDY)
    plan, programs = generation_plan(model), opt._programs
    one, (encoded, _) = plan.one(), plan.others()
    assert programs.run_again("one", one) is not None
    assert programs.run_again("source", encoded) is not None
    assert programs.run_again("one", encoded) is None
    assert programs.run_again("many", plan.many()) is None  # the first program answers those
    with torch.no_grad():
        next(opt.parameters()).add_(0.0)
    assert programs.run_again("source", encoded) is None  # it has weights made beside others


def test_compiled_code_holds_for_all_tokens_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stride grows with the text, not even of one row, and no two layers share a prefix."""
    _, opt = shared("BART")
    given: list[dict[str, Any]] = []
    ask = seq2seq.Seq2SeqGenerating._ask

    def noting(self: Any, kind: str, **inputs: Any) -> Any:
        given.append(inputs)
        return ask(self, kind, **inputs)

    monkeypatch.setattr(seq2seq.Seq2SeqGenerating, "_ask", noting)
    opt.generate(**source("BART", 1, 9), **GREEDY)
    for inputs in given:
        tensors = [one for one in pytree.tree_leaves(inputs) if isinstance(one, Tensor)]
        assert len({id(one) for one in tensors}) == len(tensors)
        for one in tensors:
            assert one.stride() == torch.empty(one.shape).stride()


def test_assisted_decoding() -> None:
    model, opt = shared("BART")
    call = source("BART", rows=1)
    wanted = model.generate(**call, **GREEDY)
    for left, right in ((opt, model), (model, opt)):
        assert torch.equal(left.generate(**call, **GREEDY, assistant_model=right), wanted)


def test_logits_and_a_dictionary() -> None:
    model, opt = shared("T5")
    options = {"return_dict_in_generate": True, "output_logits": True}
    wanted, found = both(model, opt, **source("T5"), **options)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_single_calls(family: str) -> None:
    model, opt = shared(family)
    given, ids = source(family), text(2, 7)
    wanted = model(**given, decoder_input_ids=ids)
    output = opt(**given, decoder_input_ids=ids, use_cache=False)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, wanted.logits)
    hidden = wanted.encoder_last_hidden_state
    torch.testing.assert_close(output.encoder_last_hidden_state, hidden)
    mask = {name: one for name, one in given.items() if name == "attention_mask"}
    told = {"decoder_input_ids": ids, "encoder_outputs": (hidden,), **mask}
    torch.testing.assert_close(opt(**told).logits, wanted.logits)
    torch.testing.assert_close(opt(**told, logits_to_keep=2).logits, wanted.logits[:, -2:])
    torch.testing.assert_close(opt(**told, return_dict=False)[0], wanted.logits)


@pytest.mark.parametrize("kind", ["own", "dynamic", "of the original"])
@pytest.mark.parametrize("family", ["BART", "T5"])
def test_text_goes_on_behind_a_cache_that_the_user_keeps(family: str, kind: str) -> None:
    model, opt = shared(family)
    given, ids = source(family), text(2, 30)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if kind != "own" else None
    first = (model if kind == "of the original" else opt)(
        **given, decoder_input_ids=ids[:, :10], past_key_values=cache, use_cache=True
    )
    mask = {"attention_mask": given["attention_mask"]}
    rest = {"decoder_input_ids": ids[:, 10:], "past_key_values": first.past_key_values}
    second = opt(**mask, **rest)
    wanted = model(**given, decoder_input_ids=ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), wanted)
    assert int(second.past_key_values.get_seq_length()) == 30


@pytest.mark.parametrize("family", ["BART", "T5", "Whisper"])
@given(st.data())
def test_any_order_of_reading_equals_the_whole_text(family: str, data: st.DataObject) -> None:
    """Chunks, crops, rows reordered and repeated, padding at the beginning."""
    model, opt = shared(family)
    reading = _Reading(opt, source(family, data.draw(st.integers(1, 3), "rows")))
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
    reading.check(model)


def test_a_source_that_does_not_follow_its_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = shared("BART")

    def reordered(self: Any, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)

    def read() -> None:
        reading = _Reading(opt, source("BART", 2))
        reading.read(text(2, 4), [])
        reading.reorder(torch.tensor([1, 0]))
        reading.read(text(2, 2, 1), [])
        reading.check(model)

    read()
    monkeypatch.setattr(seq2seq.SourceCache, "reorder_cache", reordered)
    with pytest.raises(AssertionError, match="not close"):
        read()


class _Reading:
    """Text about a source that was read bit by bit: ids, what of it is seen, and the logits."""

    def __init__(self, opt: Any, given: dict[str, Tensor]) -> None:
        self.opt, self.given, self.cache = opt, given, None
        rows = len(next(iter(given.values())))
        self.ids = self.seen = torch.zeros(rows, 0, dtype=torch.int64)
        self.logits = torch.zeros(rows, 0, VOCAB)

    def read(self, ids: Tensor, padded: list[int]) -> None:
        seen = torch.ones_like(ids)
        for row, count in enumerate(padded):
            seen[row, :count] = 0
        self.ids, self.seen = torch.cat([self.ids, ids], 1), torch.cat([self.seen, seen], 1)
        told = {} if self.cache is None else {"past_key_values": self.cache}
        output = self.opt(
            **self.given, decoder_input_ids=ids, decoder_attention_mask=self.seen, **told
        )
        self.cache = output.past_key_values
        self.logits = torch.cat([self.logits, output.logits], 1)

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.ids, self.seen = self.ids[:, :-count], self.seen[:, :-count]
        self.logits = self.logits[:, :-count]

    def reorder(self, order: Tensor) -> None:
        self.cache.reorder_cache(order)
        self._map(lambda one: one[order])

    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self._map(lambda one: one.repeat_interleave(2, 0))

    def _map(self, change: Any) -> None:
        self.given = {name: change(one) for name, one in self.given.items()}
        self.ids, self.seen, self.logits = map(change, (self.ids, self.seen, self.logits))

    def check(self, model: Any) -> None:
        told = {"decoder_input_ids": self.ids, "decoder_attention_mask": self.seen}
        wanted = model(**self.given, **told, use_cache=False).logits
        kept = self.seen.bool()
        torch.testing.assert_close(self.logits[kept], wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["T5", "Marian"])
def test_saved_loaded_copied_and_pickled(family: str, tmp_path: Path) -> None:
    model, opt = shared(family)
    opt.save(tmp_path / "saved")
    pickled = pickle.loads(pickle.dumps(opt))
    for twin in (fxopt.load(tmp_path / "saved"), copy.deepcopy(opt), pickled):
        assert torch.equal(*both(model, twin, **source(family), num_beams=2))
        assert len(twin.programs) == 4


def test_a_saved_kind_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    from fxopt.optimized.generators import generator_called

    with pytest.raises(SaveError, match="generates as 'songs', which this fxopt doesn't know"):
        generator_called("songs", tmp_path)


def test_further_passes_reach_all_programs() -> None:
    model, opt = shared("T5")
    further = fxopt.transform(opt, "fuse-linears")
    assert torch.equal(*both(model, further, **source("T5")))
    assert _linears(opt) == [17, 17, 12, 4]
    assert _linears(further)[2:] == [8, 1]


def _linears(opt: Any) -> list[int]:
    """How many linear layers each program has."""
    linear = torch.ops.aten.linear.default
    return [sum(node.target is linear for node in one.graph.nodes) for one in opt.programs]


def test_int8_is_judged_token_by_token() -> None:
    passes = "int8-linear{mode=weight_only, where=always}"
    opt = fxopt.transform(seq2seq_model("Marian"), passes)
    for program in opt.programs:
        assert any(t.dtype == torch.int8 for t in program.materialized().state.values())
    (note,) = [note for note in opt.report.notes if note.startswith("generation:")]
    assert "72 positions of text that the original wrote, 24 of them read one by one" in note
    assert opt.generate(**source("Marian"), **GREEDY).shape == (2, 10)


@pytest.mark.parametrize("once", [False, True])
def test_calibration_and_examples_are_sources(once: bool) -> None:
    sources = [source("BART", 2, 12, seed) for seed in range(3)]
    opt = fxopt.transform(
        seq2seq_model("BART"),
        "int8-linear{mode=static, where=always}",
        example_inputs={**source("BART", 1, 18), "decoder_input_ids": text(1, 24)},
        verify_inputs=sources[:1],
        calibration=iter(sources) if once else sources,
        generation=True,
        verify=False,
    )
    assert opt.generate(**sources[0], **GREEDY).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": text(2, 4)}, "a step computes no loss from labels"),
        ({"output_attentions": True}, "this call gives output_attentions, which a step doesn't"),
        ({"decoder_input_ids": None}, "a step reads decoder_input_ids, not decoder_inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "this call gives inputs_embeds"),
        ({"input_ids": None}, "there is no source: give input_ids, encoder_outputs, or a"),
        ({"attention_mask": torch.ones(2, 3)}, r"that of the source, \[2, 9\] in this call"),
        ({"past_key_values": DynamicCache()}, "is a DynamicCache, and an encoder-decoder keeps"),
        ({"decoder_attention_mask": torch.ones(2, 9)}, r"decoder_attention_mask must be .* \(2, 4"),
    ],
)
def test_what_no_step_computes_is_said(call: dict[str, Any], message: str) -> None:
    _, opt = shared("T5")
    with pytest.raises(InputError, match=message):
        opt(**{**source("T5"), "decoder_input_ids": text(2, 4), **call})


def test_what_no_program_encodes_is_said() -> None:
    _, opt = shared("BART")
    with pytest.raises(InputError, match="this call gives output_hidden_states, which a step"):
        opt.generate(**source("BART"), **GREEDY, output_hidden_states=True)
    with pytest.raises(InputError, match="this call gives inputs_embeds"):
        opt.generate(inputs_embeds=torch.zeros(1, 4, 32), **GREEDY)


def test_a_cache_in_int8_is_refused() -> None:
    with pytest.raises(ModelError, match="a cache in int8 is of decoders alone"):
        fxopt.transform(seq2seq_model("BART"), "canonicalize, quantize-cache", generation=True)


def test_one_call_as_before() -> None:
    model = seq2seq_model("BART")
    opt = fxopt.transform(model, "canonicalize", generation=False)
    assert not hasattr(opt, "generate")
    call = {**source("BART", 2, 16), "decoder_input_ids": text(2, 12)}
    torch.testing.assert_close(opt(**call).logits, model(**call).logits)


def test_a_family_without_steps_is_refused_with_the_reason() -> None:
    import transformers

    options = {key: value for key, value in FAMILIES["BART"][2].items() if "layers" not in key}
    config = transformers.ProphetNetConfig(
        **{**options, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    )
    model = transformers.ProphetNetForConditionalGeneration(config).eval()
    with pytest.raises(ModelError, match="ProphetNetForConditionalGeneration"):
        fxopt.transform(model, "canonicalize", generation=True)
