"""fxopt, transformers and torchao as writers: one loop of steps, each with its greedy choice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import fxopt
from benchmarks.systems.ours import WRITING
from benchmarks.systems.writing import Source, Writer, WritingSystem, Written
from fxopt.measurement.reading import TextReader
from fxopt.measurement.subject import Subject


class Stepping:
    """Calls of a model with its own cache."""

    def __init__(self, model: Any, settings: str, weight_bytes: int | None = None) -> None:
        self.model, self.settings = model, settings
        self.weight_bytes = weight_bytes or _bytes_of(model)

    def write(self, prompt: Sequence[int], new: int) -> Written:
        reader = TextReader(self.model, last_only=True)
        chosen, stamps = [], [time.perf_counter()]
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(new):
                ids = reader.read(ids)[:, -1:].argmax(-1)
                chosen.append(ids)
                stamps.append(time.perf_counter())
        return _written([int(one) for one in chosen], stamps)

    def generate(self, prompt: Sequence[int], new: int) -> float:
        """Milliseconds of a whole `generate` of as many tokens."""
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return 1e3 * (time.perf_counter() - started)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, T, V] of ids [1, T]."""
        with torch.no_grad():
            return self.model(ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


class StaticAndCompiled:
    """`generate` over transformers' static cache, whose steps torch.compile compiles."""

    def __init__(self, model: Any, settings: str) -> None:
        self.model, self.settings = model, settings
        self.weight_bytes = _bytes_of(model)

    def write(self, prompt: Sequence[int], new: int) -> Written:
        from transformers import CompileConfig

        stamps = _Stamps()
        config = CompileConfig(fullgraph=False, mode="default", dynamic=False)
        config._compile_all_devices = True  # left out, compiled is on accelerators alone
        ids = torch.tensor([prompt])
        with torch.no_grad():
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=stamps,
                cache_implementation="static",
                compile_config=config,
            )
        return _written(written[0, len(prompt) :].tolist(), stamps.times)


class _Stamps(BaseStreamer):  # type: ignore[misc]
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _written(tokens: Sequence[int], stamps: Sequence[float]) -> Written:
    """Of the beginning and the time of each token."""
    start, first, last = stamps[0], stamps[1], stamps[-1]
    step = (last - first) / (len(stamps) - 2)
    return Written(tuple(tokens), 1e3 * (first - start), 1e3 * step)


def _bytes_of(model: Any) -> int | None:
    if isinstance(model, fxopt.Optimized):
        return model.programs[-1].parameter_bytes()
    found = Subject(model, {}).parameter_bytes()
    return found if isinstance(found, int) else None


def _ours(passes: Any) -> Callable[[Source], Writer]:
    def prepare(source: Source) -> Writer:
        # The tokens that it writes are compared with the original's beside their times.
        optimized = fxopt.transform(
            source.model, passes, generation=True, verify=False, measure_cost=False
        )
        return Stepping(optimized, str(passes))

    return prepare


def _eager(dtype: torch.dtype) -> Callable[[Source], Writer]:
    def prepare(source: Source) -> Writer:
        same = dtype == torch.float32
        model = source.model if same else copy.deepcopy(source.model).to(dtype)
        return Stepping(model, "eager, sdpa, dynamic cache")

    return prepare


def _compiled(config: str | None, dtype: torch.dtype) -> Callable[[Source], Writer]:
    def prepare(source: Source) -> Writer:
        model = copy.deepcopy(source.model).to(dtype)
        if config is not None:
            import torchao.quantization as torchao

            torchao.quantize_(model, getattr(torchao, config)())
        return StaticAndCompiled(model, f"{config or dtype}, static cache, torch.compile")

    return prepare


OURS = tuple(WritingSystem(f"fxopt {name}", _ours(passes)) for name, passes in WRITING.items())
TORCH_PEERS = (
    WritingSystem("transformers fp32", _eager(torch.float32)),
    WritingSystem("transformers bf16", _eager(torch.bfloat16)),
    WritingSystem("transformers bf16 compiled", _compiled(None, torch.bfloat16), slow=True),
    WritingSystem(
        "torchao int8 compiled",
        _compiled("Int8WeightOnlyConfig", torch.bfloat16),
        ("torchao",),
        slow=True,
    ),
)
