"""Small models to train, each with batches that hold what its loss needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]


def bert(dropout: float = 0.1, seed: int = 0) -> Any:
    """A BERT classifier of one layer, in train mode."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def gpt2(seed: int = 0) -> Any:
    """A GPT-2 of one layer, whose head is its embedding, in train mode and without dropout."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=41, n_embd=16, n_layer=1, n_head=2, n_positions=12, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


class Classifier(nn.Module):
    """Convolutions, batch norms and dropout; gives its loss, as transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        logits = self.head(self.dropout(hidden))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier().train()


def text_batch(seed: int, size: int = 4, length: int = 6) -> Batch:
    """Token ids whose label can be told from their first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 41, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def causal_batch(seed: int, size: int = 4, length: int = 6) -> Batch:
    batch = text_batch(seed, size, length)
    return {**batch, "labels": batch["input_ids"]}


def image_batch(seed: int, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 6, generator=generator)
    return {"x": x, "labels": torch.randint(0, 3, (size,), generator=generator)}


def loss_of(outputs: Any) -> Tensor:
    return outputs["loss"]  # type: ignore[no-any-return]
