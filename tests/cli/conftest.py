"""The model that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT as a transformers folder."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reader(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a tokenizer."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A file of 20 texts, three batches."""
    path = tmp_path / "texts.txt"
    path.write_text("the the\n" * 20)
    return str(path)
