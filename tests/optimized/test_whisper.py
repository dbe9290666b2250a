"""An optimised Whisper in the place of the original: pipelines, languages, long sound, padding."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fxopt
from fxopt.errors import InputError
from tests.generation.language_models import VOCAB, text
from tests.generation.seq2seq_models import FRAMES, MELS, seq2seq_model, shared, source

_SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
)
_FIRST = VOCAB - 8
_NEW = {"max_new_tokens": 9, "repetition_penalty": 2.0}


def _spoken(rows: int, seconds: float = 0.5) -> list[Any]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(int(16000 * seconds)).astype("float32") for _ in range(rows)]


def _pipeline(model: Any) -> Any:
    """Transcription of sound of one second at most; the last id says second 0."""
    ids = {f"w{index}": index for index in range(_FIRST)}
    ids |= {token: _FIRST + index for index, token in enumerate((*_SPECIAL, "<|0.00|>"))}
    tokenizer = transformers.WhisperTokenizer(vocab=ids, merges=[], pad_token=_SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=MELS, chunk_length=1, hop_length=16000 // FRAMES
    )
    return transformers.pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=tokenizer,
        feature_extractor=extractor,
        generate_kwargs=_NEW,
    )


def _multilingual(model: Any) -> None:
    """Let `model` know its tokens as a Whisper of several languages does."""
    config = model.generation_config
    config.is_multilingual = True
    config.decoder_start_token_id = _FIRST + 1
    config.lang_to_id = {"<|en|>": _FIRST + 2, "<|de|>": _FIRST + 3}
    config.task_to_id = {"transcribe": _FIRST + 4, "translate": _FIRST + 5}
    config.no_timestamps_token_id = _FIRST + 6
    config.eos_token_id = config.pad_token_id = _FIRST
    config.max_initial_timestamp_index = 0


@pytest.fixture(scope="module")
def multilingual() -> tuple[Any, Any]:
    model = seq2seq_model("Whisper")
    _multilingual(model)
    return model, fxopt.transform(model, "canonicalize")


def _answers(pair: tuple[Any, Any], sounds: list[Any], **call: Any) -> tuple[Any, Any]:
    found = []
    for one in pair:
        torch.manual_seed(0)
        found.append(_pipeline(one)(sounds, **call))
    return found[0], found[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_pipeline_transcribes(rows: int, options: dict[str, Any]) -> None:
    call = {"batch_size": rows, "generate_kwargs": {**_NEW, **options}}
    wanted, found = _answers(shared("Whisper"), _spoken(rows), **call)
    assert found == wanted
    assert len(wanted) == rows
    assert all(one["text"] for one in wanted)


@pytest.mark.parametrize(
    "options", [{}, {"language": "de", "task": "translate"}, {"return_timestamps": True}]
)
def test_languages_are_heard_and_timestamps_written(
    multilingual: tuple[Any, Any], options: dict[str, Any]
) -> None:
    given = source("Whisper", 2)
    wanted, found = (one.generate(**given, **_NEW, **options) for one in multilingual)
    assert torch.equal(found, wanted)
    heard = [
        one.detect_language(**given, generation_config=one.generation_config)
        for one in multilingual
    ]
    assert torch.equal(*heard)


def test_long_sound_is_transcribed_part_by_part(multilingual: tuple[Any, Any]) -> None:
    features = torch.randn(1, MELS, 3 * FRAMES, generator=torch.Generator().manual_seed(1))
    for conditioned in (False, True):
        options = {"return_timestamps": True, "condition_on_prev_tokens": conditioned}
        wanted, found = (
            one.generate(features, **_NEW, **options, return_segments=True) for one in multilingual
        )
        assert torch.equal(found["sequences"], wanted["sequences"])
        assert len(found["segments"][0]) == len(wanted["segments"][0])


def test_positions_count_what_is_seen_of_a_padded_text() -> None:
    model, opt = shared("Whisper")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    call = {
        **source("Whisper"),
        "decoder_input_ids": text(2, 5),
        "decoder_attention_mask": mask,
        "decoder_position_ids": positions,
    }
    kept = mask.bool()
    torch.testing.assert_close(opt(**call).logits[kept], model(**call).logits[kept])


def test_saved_and_loaded_with_what_it_knows_of_languages(
    multilingual: tuple[Any, Any], tmp_path: Path
) -> None:
    model, opt = multilingual
    opt.save(tmp_path / "saved")
    given = source("Whisper", 2)
    wanted = model.generate(**given, **_NEW, language="de")
    for twin in (fxopt.load(tmp_path / "saved"), pickle.loads(pickle.dumps(opt))):
        assert torch.equal(twin.generate(**given, **_NEW, language="de"), wanted)


def test_times_of_words_are_refused(multilingual: tuple[Any, Any]) -> None:
    _, opt = multilingual
    opt.generation_config.alignment_heads = [[0, 0]]
    with pytest.raises(InputError, match="this call gives output_attentions, which a step doesn't"):
        opt.generate(**source("Whisper"), **_NEW, return_token_timestamps=True)


def test_sound_alone_is_the_example() -> None:
    model = seq2seq_model("Whisper")
    call = {**source("Whisper"), "labels": text(2, 4)}
    with pytest.raises(InputError, match=r"generates from input_features .*\(labels has no place"):
        fxopt.transform(model, "canonicalize", example_inputs=call, generation=True)


def test_a_pipeline_is_optimised_on_its_own_sound() -> None:
    pipeline = _pipeline(seq2seq_model("Whisper"))
    sounds, call = _spoken(2), {"generate_kwargs": _NEW}
    wanted = pipeline(sounds, **call)
    fxopt.optimize_pipeline(pipeline, sounds, "canonicalize", calibration=_spoken(3, 0.2))
    assert isinstance(pipeline.model, fxopt.Optimized)
    assert pipeline(sounds, **call) == wanted
