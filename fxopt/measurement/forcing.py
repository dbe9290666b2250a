"""Teacher forcing: what a candidate says where it reads given text token by token.

Its keys and values are its own, and their errors add up as they do where it writes. The reference
reads the whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import MeasureError
from fxopt.measurement.agreement import Agreement
from fxopt.measurement.outputs import rows
from fxopt.measurement.pair import Pair
from fxopt.measurement.reading import TextReader, text_in
from fxopt.measurement.task_scores import NextToken


@dataclass(frozen=True)
class Decoded:
    """What the logits of `tokens` tokens that were read one by one are worth.

    `sqnr_db` is in decibels, `kl` (the mean) and `kl_max` in nats; `greedy_match` is the share of
    those whose largest logit is the reference's. `perplexity` is over the tokens that follow one of
    them, `prefill_perplexity` over the same where the candidate reads the whole text at once: equal
    but for rounding, and for what the cache rounds. None where no token follows another.
    """

    tokens: int
    sqnr_db: float
    kl: float
    kl_max: float
    greedy_match: float
    perplexity: Pair | None = None
    prefill_perplexity: Pair | None = None

    def figures(self) -> Iterator[tuple[str, str]]:
        """Names and texts of what was measured."""
        yield "SQNR", f"{self.sqnr_db:.1f} dB"
        yield "KL", f"{self.kl:.4g} nats, {self.kl_max:.4g} at most"
        yield "greedy match", f"{self.greedy_match:.4g}"
        if self.perplexity is not None and self.prefill_perplexity is not None:
            yield "perplexity", str(self.perplexity)
            yield "read at once", str(self.prefill_perplexity)


class Forcing:
    """The last `tokens` tokens of each text, read one by one; sums over batches."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.agreement = Agreement()
        self.reference, self.steps, self.whole = NextToken(), NextToken(), NextToken()

    def add(self, model: Any, batch: Any, index: int, reference: Tensor, whole: Tensor) -> None:
        """A batch of which `reference` and `whole` [B, T, V] are the two models' logits at once.

        Raises `MeasureError` for a batch that is no text, or too short.
        """
        ids, seen = text_in(batch, f"batch {index} of data")
        split = ids.shape[1] - self.tokens
        if split < 1:
            raise MeasureError(
                f"one_by_one={self.tokens} with {ids.shape[1]} tokens in batch {index}: give "
                "fewer, so that at least one is read before"
            )
        reader = TextReader(model)
        reader.read(ids[:, :split], seen[:, :split])
        read = [
            reader.read(ids[:, at : at + 1], seen[:, at : at + 1])
            for at in range(split, ids.shape[1])
        ]
        logits = torch.cat(read, 1).to(reference.device)
        labels, mask = ids[:, split:], seen[:, split:].to(reference.device)
        expected = reference[:, split:]
        self.agreement.add(rows(expected, mask), rows(logits, mask))
        for task, found in (
            (self.reference, expected),
            (self.steps, logits),
            (self.whole, whole[:, split:]),
        ):
            task.add(found, labels, mask)

    def decoded(self) -> Decoded | None:
        """What it came to; None where no token was judged."""
        seen = self.agreement
        if seen.kl is None or seen.kl_max is None or seen.top1 is None:
            return None
        expected = self.reference.perplexity
        return Decoded(
            seen.rows + seen.broken,
            seen.sqnr_db,
            seen.kl,
            seen.kl_max,
            seen.top1,
            Pair.of(expected, self.steps.perplexity),
            Pair.of(expected, self.whole.perplexity),
        )
