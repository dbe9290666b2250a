"""Tiny teachers and students, and batches that hold what their losses need."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.training.models import Batch, text_batch

__all__ = ["Batch", "Rows", "bert", "encoder", "rows", "state_of", "text_batch"]


def _config(layers: int, width: int, dropout: float, **options: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=41, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=12, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation="eager", **options,
    )  # fmt: skip


def bert(
    layers: int = 2, width: int = 16, dropout: float = 0.0, seed: int = 0, **options: Any
) -> Any:
    """A BERT classifier of three labels."""
    torch.manual_seed(seed)
    config = _config(layers, width, dropout, **options)
    return transformers.BertForSequenceClassification(config)


def encoder(layers: int = 2, width: int = 16, seed: int = 0, **options: Any) -> Any:
    """A BERT that gives embeddings, without a pooler."""
    torch.manual_seed(seed)
    return transformers.BertModel(_config(layers, width, 0.0, **options), add_pooling_layer=False)


class Rows(torch.utils.data.Dataset[Batch]):
    """The rows of one large batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return int(next(iter(self.batch.values())).shape[0])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.batch.items()}


def rows(count: int = 12, padded: bool = True) -> Rows:
    """`count` labelled texts of six tokens; the first is half padding where `padded`."""
    batch = text_batch(0, count)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return Rows(batch)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
