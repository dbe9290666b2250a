"""How far a cheaper model bends what the original says, in the units of its task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.systems import Call, Inputs
from fxopt.comparison import pareto_front
from fxopt.measurement.task_scores import NextToken


def embed(call: Call, batches: Sequence[Inputs]) -> Tensor:
    """Sentence embeddings `[texts, hidden]`: the mean over real tokens, scaled to length 1."""
    pooled = []
    for batch in batches:
        hidden = call(batch).to(torch.float64)
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def agreement(reference: Tensor, embeddings: Tensor) -> dict[str, float]:
    """How well `embeddings` `[texts, hidden]` stand for `reference`, both of unit length.

    `cosine_mean` and `cosine_min` over the texts, `spearman` of the similarities of all pairs, and
    `same_neighbour`: the share of texts whose most similar other text is the same.
    """
    cosine = (reference * embeddings).sum(-1)
    before, after = reference @ reference.T, embeddings @ embeddings.T
    upper = torch.triu_indices(*before.shape, offset=1).unbind()
    same = _neighbours(before) == _neighbours(after)
    return {
        "cosine_mean": round(cosine.mean().item(), 6),
        "cosine_min": round(cosine.min().item(), 6),
        "spearman": round(spearman(before[upper], after[upper]), 5),
        "same_neighbour": round(same.double().mean().item(), 4),
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def perplexity(call: Call, windows: Sequence[Tensor]) -> float:
    """exp of the mean negative log likelihood of each next token in windows `[1, length]`.

    `call` gives logits `[1, length, vocabulary]` for `{"input_ids": window}`.
    """
    tokens = NextToken()
    for window in windows:
        tokens.add(call({"input_ids": window}), window, None)
    found = tokens.perplexity
    if found is None:
        raise ValueError("perplexity() got no window of at least two tokens")
    return found


def on_the_front(points: Mapping[str, tuple[float, float]]) -> dict[str, bool]:
    """Which of `{name: (milliseconds, truth)}` no other is both at least as fast and as true as."""

    front = pareto_front({name: (time, -truth) for name, (time, truth) in points.items()})
    return {name: name in front for name in points}


def _neighbours(similarity: Tensor) -> Tensor:
    return similarity.clone().fill_diagonal_(-math.inf).argmax(-1)
