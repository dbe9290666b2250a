"""Models that write text, timed in turns: the first token, steps behind contexts, `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import MeasureError
from fxopt.measurement.counters import Unmeasured
from fxopt.measurement.energy import Energy
from fxopt.measurement.generation import Decoding, Generation
from fxopt.measurement.reading import TextReader, cache_bytes, text_in, why_unreadable
from fxopt.timing import Latency, latency, summarize

System = Callable[[], object]
Joules = Callable[[Mapping[str, System], int], Mapping[str, Energy | Unmeasured]]
"""The energy of a call of each system, which takes so many tokens."""


@dataclass(frozen=True)
class Task:
    """What is to be written: `new_tokens` behind the text, and as many behind each context.

    A context is the text, repeated and cut to so many slots, without padding.
    """

    ids: Tensor
    seen: Tensor
    new_tokens: int
    contexts: tuple[int, ...]

    @staticmethod
    def of(inputs: Any, new_tokens: int, contexts: Sequence[int]) -> Task:
        """Raises `MeasureError` for inputs that are no text, and for numbers out of range."""
        if type(new_tokens) is not int or new_tokens < 2:
            raise MeasureError(
                f"new_tokens={new_tokens!r}: give how many tokens are written, at least 2, so that "
                "one is written behind another"
            )
        wrong = [one for one in contexts if type(one) is not int or one < 0]
        if wrong or not contexts:
            raise MeasureError(
                f"contexts={tuple(contexts)!r}: give how many tokens the cache holds before the "
                "steps that are timed, such as (0, 1024)"
            )
        return Task(*text_in(inputs, "inputs"), new_tokens, tuple(contexts))

    @property
    def rows(self) -> int:
        """How many texts are written at once."""
        return self.ids.shape[0]

    def context(self, length: int) -> Tensor:
        """The text as ids [B, length]."""
        times = -(-length // self.ids.shape[1])
        return self.ids.repeat(1, times)[:, :length]


@dataclass(frozen=True)
class Writer:
    """A model that is given a task; each method is what is timed."""

    model: Any
    task: Task

    def first_token(self) -> Tensor:
        """Read the text with an empty cache; the choice of the first token, [B]."""
        return (
            TextReader(self.model, last_only=True)
            .read(self.task.ids, self.task.seen)[:, -1]
            .argmax(-1)
        )

    def generate(self) -> Tensor:
        """The whole `generate`, greedy."""
        written: Tensor = self.model.generate(
            self.task.ids,
            attention_mask=self.task.seen.long(),
            max_new_tokens=self.task.new_tokens,
            min_new_tokens=self.task.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        return written

    def behind(self, context: int) -> System:
        """The steps behind `context` slots, which are forgotten each time."""
        reader = TextReader(self.model, last_only=True)
        if context:
            reader.read(self.task.context(context))
        return partial(self._steps, reader)

    def held(self, context: int) -> float:
        """Bytes that the cache holds of a token of a row, behind `context` slots and the steps."""
        reader = TextReader(self.model, last_only=True)
        length = context + self.task.new_tokens
        reader.read(self.task.context(length))
        return cache_bytes(reader.cache) / (self.task.rows * length)

    def _steps(self, reader: TextReader) -> Tensor:
        ids = self.task.ids[:, :1]
        for _ in range(self.task.new_tokens):
            ids = reader.read(ids)[:, -1:].argmax(-1)
        reader.forget_last(self.task.new_tokens)
        return ids


def measure_generation(
    models: Mapping[str, Any], task: Task, repeats: int, seconds: float, joules: Joules
) -> dict[str, Generation | Unmeasured]:
    """What writing costs with each model, in turns; `Unmeasured` where one doesn't write.

    Each part, which is the first token, the steps behind each context and the whole call, takes
    rounds within `seconds` of its own.
    """
    found: dict[str, Generation | Unmeasured] = {}
    writers = {}
    for name, model in models.items():
        reason = _why_not(model, task)
        if reason is None:
            writers[name] = Writer(model, task)
        else:
            found[name] = Unmeasured(reason)
    if not writers:
        return found
    firsts = latency({n: w.first_token for n, w in writers.items()}, repeats, seconds)
    decoding = [_decoding(writers, one, repeats, seconds, joules) for one in task.contexts]
    wholes = latency({n: w.generate for n, w in writers.items()}, repeats, seconds)
    for name, writer in writers.items():
        found[name] = Generation(
            task.rows,
            task.ids.shape[1],
            task.new_tokens,
            firsts[name],
            int(task.seen.sum()) * 1e3 / firsts[name].median,
            tuple(each[name] for each in decoding),
            wholes[name],
            writer.held(max(task.contexts)),
        )
    return found


def _decoding(
    writers: Mapping[str, Writer], context: int, repeats: int, seconds: float, joules: Joules
) -> dict[str, Decoding]:
    steps = {name: writer.behind(context) for name, writer in writers.items()}
    times = latency(steps, repeats, seconds)
    task = next(iter(writers.values())).task
    spent = joules(steps, task.rows * task.new_tokens)
    return {name: _of_one_step(context, times[name], spent[name], task) for name in writers}


def _of_one_step(context: int, time: Latency, spent: Energy | Unmeasured, task: Task) -> Decoding:
    step = summarize([sample / task.new_tokens for sample in time.samples])
    return Decoding(context, step, task.rows * 1e3 / step.median, spent)


def _why_not(model: Any, task: Task) -> str | None:
    """Why `model` can't be given the task; tried, as a peer's module may fail in any way."""
    reason = why_unreadable(model)
    if reason is not None:
        return reason
    longest = max(task.ids.shape[1], *task.contexts) + task.new_tokens
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        return f"the model has {most} positions, and {longest} are asked for"
    try:
        with torch.no_grad():
            Writer(model, task).first_token()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
