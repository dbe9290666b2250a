"""What writing text costs, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.measurement.counters import Unmeasured
from fxopt.measurement.energy import Energy
from fxopt.timing import Latency


@dataclass(frozen=True)
class Decoding:
    """Steps that read one token a row behind `context` slots and more.

    `latency` is the milliseconds of one step with the greedy choice of its token, the mean over the
    steps of a sample; `tokens_per_second` counts the tokens of all rows. The joules of `energy` are
    those of as many steps as its tokens, shared by the rows.
    """

    context: int
    latency: Latency
    tokens_per_second: float
    energy: Energy | Unmeasured


@dataclass(frozen=True)
class Generation:
    """The cost of writing `new_tokens` behind a prompt of `prompt_tokens` in each of `rows`.

    `first_token` is the milliseconds until the first token is chosen, behind an empty cache, and
    `prompt_tokens_per_second` the tokens of all rows that are read in it; `whole` the milliseconds
    of a greedy `generate` call. `cache_bytes_per_token` is what the cache holds of one token of one
    row, the mean over the longest context; room for more tokens isn't counted.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    first_token: Latency
    prompt_tokens_per_second: float
    decoding: tuple[Decoding, ...]
    whole: Latency
    cache_bytes_per_token: float
