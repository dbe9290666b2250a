"""A cache in int8: rounded once, slot by slot, whatever happens to it; steps that read it."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import fxopt
import fxopt.generation.cache as caches
from fxopt.errors import EquivalenceError, ModelError
from fxopt.generation.cache import GrowingLayer, Int8Layer, PrefixCache
from fxopt.measurement import fidelity
from fxopt.measurement.reading import TextReader, cache_bytes
from tests.generation.language_models import language_model, original, shared, text

ops = torch.ops.fxopt
GREEDY = {"max_new_tokens": 9, "do_sample": False}


@functools.cache
def rounding(family: str) -> Any:
    """What `QuantizeCache` makes of the shared model of a family; no test writes to it."""
    return fxopt.transform(original(family), "canonicalize, quantize-cache")


def rounded(heads: Tensor) -> Tensor:
    """What int8 makes of [B, G, S, D]."""
    return ops.dequantize(*ops.quantize_per_token(heads), heads.dtype)  # type: ignore[no-any-return]


class RoundedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Transformers' layer, of whose slots earlier calls left what int8 makes of them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[no-untyped-call]
        past: Any = (self.keys, self.values)
        new = (key_states, value_states)
        self.keys, self.values = (
            torch.cat([a, rounded(b)], -2) for a, b in zip(past, new, strict=True)
        )
        return tuple(torch.cat([a, b], -2) for a, b in zip(past, new, strict=True))


def reference_cache() -> Cache:
    return Cache(layer_class_to_replicate=RoundedLayer)


@given(st.data())
def test_each_slot_is_rounded_once_whatever_happens_to_it(data: st.DataObject) -> None:
    ours, theirs = Int8Layer(), DynamicLayer()  # type: ignore[no-untyped-call]
    rows = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 10))):
        kind = data.draw(
            st.sampled_from(["append", "append", "crop", "reorder", "repeat", "reset"])
        )
        layers: list[Any] = [ours, theirs]
        if kind == "append" or not theirs.get_seq_length():
            new = torch.randn(2, rows, 2, data.draw(st.integers(1, 70)), 3)
            for layer in layers:
                layer.update(new[0], new[1])
        elif kind == "crop":
            count = data.draw(st.integers(0, theirs.get_seq_length() - 1))
            for layer in layers:
                layer.crop(-count)
        elif kind == "reset":
            for layer in layers:
                layer.reset()
            continue
        elif kind == "repeat" and rows < 4:
            rows *= 2
            for layer in layers:
                layer.batch_repeat_interleave(2)
        else:
            order = torch.randint(rows, (rows,))
            for layer in layers:
                layer.reorder_cache(order)
        held: Any = (theirs.keys, theirs.values)
        for found, wanted in zip(ours.floats(), held, strict=True):
            assert torch.equal(found, rounded(wanted))
        assert ours.held[0].dtype == torch.int8
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
@given(st.data())
def test_any_order_of_reading_is_that_of_a_rounded_prefix(family: str, data: st.DataObject) -> None:
    """Slots of a call are exact in it, and rounded in those that come after."""
    model, opt = original(family), rounding(family)
    caches_: list[Any] = [reference_cache(), PrefixCache(int8=True)]
    rows, length = data.draw(st.integers(1, 2)), 0
    for step in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["many", "one", "crop", "reorder", "repeat"]))
        if kind == "crop" and length > 1:
            count = data.draw(st.integers(1, length - 1))
            for cache in caches_:
                cache.crop(-count)
            length -= count
        elif kind == "reorder" and length:
            order = torch.randint(rows, (rows,))
            for cache in caches_:
                cache.reorder_cache(order)
        elif kind == "repeat" and length and rows < 3:
            rows *= 2
            for cache in caches_:
                cache.batch_repeat_interleave(2)
        else:
            ids = text(rows, 1 if kind == "one" else data.draw(st.integers(1, 9)), step)
            length += ids.shape[1]
            with torch.no_grad():
                wanted, found = (
                    one(
                        input_ids=ids,
                        attention_mask=torch.ones(rows, length, dtype=torch.int64),
                        past_key_values=cache,
                        use_cache=True,
                    ).logits
                    for one, cache in zip((model, opt), caches_, strict=True)
                )
            # A rounding that falls on a tie may go either way after sums in another order.
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GPT2", "GptOss", "Qwen3"])
def test_families_keep_the_claim(family: str) -> None:
    model, opt = original(family), rounding(family)
    record = opt.report.steps[-1]
    assert record.fired == {"ReadInt8Prefix": 2}
    batches = [{"input_ids": text(2, 30, seed)} for seed in range(2)]
    found = fidelity(model, opt, batches, one_by_one=20).decoded
    assert found is not None
    assert found.perplexity is not None
    assert found.sqnr_db > 26
    assert abs(found.perplexity.candidate / found.perplexity.reference - 1) < 0.01


def test_a_slot_takes_a_byte_for_each_entry_and_four_for_each_head() -> None:
    reader, exact = TextReader(rounding("Llama")), TextReader(shared("Llama")[1])
    with torch.no_grad():
        for one in (reader, exact):
            one.read(text(2, 5))
    assert cache_bytes(exact.cache) == 2 * 5 * 2 * 2 * 2 * 8 * 4
    assert cache_bytes(reader.cache) == 2 * 5 * 2 * 2 * 2 * (8 + 4)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_it_generates_and_is_saved_copied_and_pickled(mode: dict[str, Any], tmp_path: Path) -> None:
    opt = rounding("Llama")
    opt.save(tmp_path / "saved")
    prompt = {
        "input_ids": text(2, 7),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]),
    }
    written = opt.generate(**prompt, **GREEDY, **mode)
    if mode.get("use_cache") is False:
        wanted = original("Llama").generate(**prompt, **GREEDY, **mode)
        assert torch.equal(written, wanted)
    pickled = pickle.loads(pickle.dumps(opt))
    for twin in (fxopt.load(tmp_path / "saved"), copy.deepcopy(opt), pickled):
        assert torch.equal(twin.generate(**prompt, **GREEDY, **mode), written)


def test_caches_of_either_kind_are_gone_on_from() -> None:
    """A user's cache of floats is rounded as it is read, and one in int8 expanded."""
    model, exact = shared("Llama")
    opt, ids = rounding("Llama"), text(1, 9)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        for cache, one in ((DynamicCache(), opt), (PrefixCache(), opt), (PrefixCache(True), exact)):
            one(ids[:, :8], past_key_values=cache)
            found = one(ids[:, 8:], past_key_values=cache).logits[:, -1]
            assert 1e-7 < (found - wanted).norm() / wanted.norm() < 0.05


def test_further_passes_keep_the_cache() -> None:
    opt = rounding("Llama")
    further = fxopt.transform(opt, "fuse-linears")
    prompt = text(1, 5)
    assert torch.equal(further.generate(prompt, **GREEDY), opt.generate(prompt, **GREEDY))
    assert isinstance(further(prompt).past_key_values.layers[0], Int8Layer)


def test_a_module_with_a_cache_of_floats_is_refused() -> None:
    with pytest.raises(
        ModelError,
        match=r"transformed already, with a cache in floating point; "
        "QuantizeCache goes into the list with which the original",
    ):
        fxopt.transform(shared("Llama")[1], "quantize-cache")
    (refused, _) = fxopt.QuantizeCache().plan(shared("Llama")[1].program).refusals
    assert refused.reason == "its prefix is given in floating point"


def test_without_a_cache_the_report_says_so() -> None:
    opt = fxopt.transform(
        original("Llama"), "quantize-cache", example_inputs={"input_ids": text(2, 5)}
    )
    assert any(note.startswith("QuantizeCache has no cache here") for note in opt.report.notes)


def test_a_claim_that_text_breaks_is_told() -> None:
    with pytest.raises(EquivalenceError, match="read token by token, the result broke its claim"):
        fxopt.transform(language_model("Llama"), [fxopt.QuantizeCache(claim=fxopt.Sqnr(80.0))])


@pytest.mark.parametrize("side", ["key_scales", "value_scales"])
def test_scales_that_are_a_slot_off_are_seen(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append = GrowingLayer.append

    def shifted(self: Any, keys: Tensor, values: Tensor) -> None:
        append(self, keys, values)
        if isinstance(self, Int8Layer):
            setattr(self, side, getattr(self, side).roll(1, 2))

    monkeypatch.setattr(caches.GrowingLayer, "append", shifted)
    with pytest.raises(EquivalenceError, match="read token by token"):
        fxopt.transform(language_model("Llama"), "quantize-cache")
