"""Break-even of a linear layer: which questions are asked, and how the answers read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import pytest
import torch

from fxopt import kernels
from fxopt.errors import KernelError
from fxopt.kernels import linear_speed
from fxopt.kernels.linear_speed import LINEAR_KERNELS, Operands, linear_speeds
from fxopt.timing import Latency, summarize, timings_in

KERNELS = dict.fromkeys(("float", "int8", "weight_only"), lambda given: None)


def clock(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    """int8 takes 0.5 + 6 / M of float's time, weight-only 0.6 at one row and 1.1 else."""
    assert isinstance(key, tuple)
    m = key[1]
    times = {"float": 1.0, "int8": 0.5 + 6 / m, "weight_only": 0.6 if m == 1 else 1.1}
    return {name: summarize([times[name] * m] * 9) for name in systems}


def speeds(m: int, **options: object) -> linear_speed.BreakEven:
    with timings_in(None, clock):
        return linear_speeds(m, 768, 3072, torch.float32, table=KERNELS, **options)  # type: ignore[arg-type]


def test_the_table_and_the_sentence() -> None:
    assert str(speeds(128)).splitlines() == [
        "linear layer K=768, N=3072 in torch.float32 on cpu",
        "  rows    float   int8  weight_only      fastest",
        "     1     1 ms  6.50x        0.60x  weight_only",
        "    16    16 ms  0.88x        1.10x         int8",
        "    64    64 ms  0.59x        1.10x         int8",
        "   128   128 ms  0.55x        1.10x         int8",
        "   256   256 ms  0.52x        1.10x         int8",
        "  1024  1024 ms  0.51x        1.10x         int8",
        "at K=768, N=3072: weight_only up to M = 1 (0.60x), "
        "int8 from M = 16 on (0.51x at M = 1024)",
    ]


def test_the_sentence_names_every_stretch() -> None:
    assert speeds(8, rows=(1, 8, 9, 16)).sentence == (
        "at K=768, N=3072: weight_only up to M = 1 (0.60x), float from M = 8 to 9, "
        "int8 from M = 16 on (0.88x)"
    )
    assert speeds(8, rows=(1, 64)).sentence == (
        "at K=768, N=3072: weight_only up to M = 1 (0.60x), float at M = 8, "
        "int8 from M = 64 on (0.59x)"
    )
    assert speeds(64, rows=()).sentence == "at K=768, N=3072: int8 at M = 64 (0.59x)"
    assert speeds(8, rows=(9,)).sentence == "at K=768, N=3072: float from M = 8 on"


def test_the_rows_at_hand_are_always_timed_others_where_that_is_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_speed, "_MOST_WORK", 64 * 768 * 3072)
    found = speeds(512)
    assert sorted(found.timings) == [1, 16, 64, 512]
    assert found.untimed == (256, 1024)
    assert "  not timed, too long: M = 256, 1024" in found.lines()


def test_between_two_timed_numbers_of_rows_the_smaller_answers() -> None:
    found = speeds(1, rows=(16, 64))
    assert found.at(1) == found.timings[1]
    assert found.at(63) == found.timings[16]
    assert found.at(9999) == found.timings[64]
    assert speeds(16, rows=()).at(1) == speeds(16, rows=()).timings[16]


def test_an_empty_batch_is_timed_as_one_row() -> None:
    assert sorted(speeds(0, rows=(16,)).timings) == [1, 16]


def test_a_kernel_that_cannot_run_is_named() -> None:
    def broken(given: Operands) -> object:
        raise RuntimeError("no such unit")

    with timings_in(None, clock):
        found = linear_speeds(4, 8, 8, torch.float32, rows=(), table={**KERNELS, "int8": broken})
    assert "  int8 can't run: no such unit" in found.lines()
    assert not found.at(4).pays("int8")


def test_the_question_holds_all_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        asked.append(key)
        return clock(key, systems)

    def once(m: int, k: int, n: int, dtype: torch.dtype) -> None:
        linear_speeds(m, k, n, dtype, rows=(), table=KERNELS)

    questions = [
        (4, 8, 8, torch.float32),
        (5, 8, 8, torch.float32),
        (4, 9, 8, torch.float32),
        (4, 8, 9, torch.float32),
        (4, 8, 8, torch.bfloat16),
    ]
    with timings_in(None, ask):
        for question in (*questions, *questions):
            once(*question)
        assert len(asked) == len(set(asked)) == len(questions)
        monkeypatch.setattr(linear_speed, "kernels_digest", lambda: "other code")
        once(*questions[0])
    assert len(asked) == len(questions) + 1


def test_the_digest_covers_the_kernels_source() -> None:
    assert linear_speed.kernels_digest() == linear_speed.kernels_digest.__wrapped__()
    assert len(list(Path(kernels.__file__).parent.rglob("*.py"))) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 32, 16), (17, 33, 5), (3, 1, 1)])
def test_the_real_kernels_run(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    given = Operands(m, k, n, dtype, torch.device("cpu"))
    with torch.no_grad():
        for name, kernel in LINEAR_KERNELS.items():
            if (name, dtype) == ("int8_static", torch.float16):
                with pytest.raises(KernelError, match=r"not torch\.float16"):
                    kernel(given)
                continue
            result = kernel(given)
            assert isinstance(result, torch.Tensor)
            assert (result.shape, result.dtype) == ((m, n), dtype)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_real_break_even_is_measured_and_recalled() -> None:
    with timings_in(None):
        found = linear_speeds(4, 32, 32, torch.float32, rows=(1,))
        assert linear_speeds(4, 32, 32, torch.float32, rows=(1,)) == found
    assert sorted(found.timings) == [1, 4]
    assert all(timing.verdict in LINEAR_KERNELS for timing in found.timings.values())
