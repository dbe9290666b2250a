"""Prints, as JSON, the peak extra memory of transforming BERT-base; run in a process of its own."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fxopt
from fxopt.timing import peak_memory

_PASSES = "canonicalize, fuse-linears, int8-linear"


def main() -> None:
    """`peak_bytes` (None where it can't be read) and `rewritten_bytes` of the new parameters."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    # Few tokens, so that the judge's activations don't count as the transform's memory.
    inputs = {"input_ids": torch.randint(1000, 20000, (2, 8))}

    def transform() -> nn.Module:
        return fxopt.transform(model, passes=_PASSES, example_inputs=inputs)

    memory = peak_memory(transform, "cpu")
    rewritten = _rewritten_bytes(model, transform())
    peak = None if memory is None else memory.bytes
    print(json.dumps({"peak_bytes": peak, "rewritten_bytes": rewritten}))


def _rewritten_bytes(model: nn.Module, optimized: nn.Module) -> int:
    shared = {_storage(tensor) for tensor in model.state_dict().values()}
    new = {
        _storage(tensor): tensor.untyped_storage().nbytes()
        for tensor in optimized.state_dict().values()
        if _storage(tensor) not in shared
    }
    return sum(new.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


if __name__ == "__main__":
    main()
