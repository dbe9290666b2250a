"""SmolLM2-135M writes 64 tokens behind a prompt: time a token, whole `generate` calls in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fxopt
from benchmarks.conftest import Effort, Record
from benchmarks.models import Language, smollm2
from benchmarks.sidebyside import in_turns, spread, timing
from fxopt.timing import ratio

_PROMPT, _NEW = 32, 64
_LISTS = {"fxopt fp32": "canonicalize, fuse-linears, lower"}


@pytest.fixture(scope="module")
def language(quick: bool) -> Language:
    return smollm2(_PROMPT, quick=quick, judged=2)


def test_generation(language, effort: Effort, benchmark, record: Record) -> None:  # type: ignore[no-untyped-def]
    """Milliseconds a token of greedy text, and how many tokens are the original's."""
    prompt = language.evaluation[0]
    models: dict[str, Any] = {"transformers fp32": language.model}
    for name, passes in _LISTS.items():
        models[name] = fxopt.transform(language.model, passes, measure_cost=False)
    texts = {name: _written(model, prompt) for name, model in models.items()}
    runs: dict[str, Callable[[], object]] = {
        name: partial(_written, model, prompt) for name, model in models.items()
    }
    times = benchmark.pedantic(
        in_turns, args=(runs, effort["repeats"], effort["seconds"]), rounds=1
    )
    original, wanted = times["transformers fp32"], texts["transformers fp32"]
    figures: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "prompt": list(prompt.shape),
        "new_tokens": _NEW,
        "systems": {
            name: {
                **timing(times[name]),
                "tokens_per_second": round(1e3 * _NEW / times[name].median, 1),
                "tokens_of_the_original": int((texts[name] == wanted).sum()) - prompt.numel(),
                **_judged(model),
            }
            for name, model in models.items()
        },
        "ratios": {
            f"{name} / transformers fp32": spread(ratio(times[name], original)) for name in _LISTS
        },
    }
    benchmark.extra_info.update(figures)
    record("smollm2_generation", figures)


def _written(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        pad_token_id=0,
    )


def _judged(model: Any) -> dict[str, str]:
    """What the report says of text that was read token by token."""
    notes = model.report.notes if isinstance(model, fxopt.Optimized) else ()
    found = next((note for note in notes if note.startswith("generation:")), None)
    return {} if found is None else {"judged": found}
