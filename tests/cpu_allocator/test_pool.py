"""What compiled programs free serves their next calls, and nothing that is alive is given twice."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import platform
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler

import fxopt
from fxopt import cpu_allocator
from fxopt.cpu_allocator import pool
from fxopt.kernels.onednn_int8 import takes_full_range
from fxopt.timing import peak_memory

_KB = 1 << 10
_MB = 1 << 20


@pytest.fixture(autouse=True)
def _empty_pool() -> Iterator[None]:
    assert cpu_allocator.load()
    gc.collect()
    cpu_allocator.release()
    yield
    cpu_allocator.release()


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


make = cpu_allocator.reusing(_bytes)


def test_a_block_serves_the_next_call() -> None:
    address = make(_MB).data_ptr()
    assert cpu_allocator.kept_bytes() == _MB
    again = make(_MB)
    assert again.data_ptr() == address
    assert cpu_allocator.kept_bytes() == 0


def test_the_block_used_last_comes_first() -> None:
    first, second = make(_MB), make(_MB)
    address = first.data_ptr()
    del second, first
    assert make(_MB).data_ptr() == address


def test_what_is_alive_is_not_given_again() -> None:
    tensors = [make(_MB) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 4


@pytest.mark.parametrize(("asked", "served"), [(_MB // 2, True), (_MB // 2 - 1, False)])
def test_a_block_serves_what_is_at_least_half_as_large(asked: int, served: bool) -> None:
    make(_MB)
    held = make(asked)
    assert cpu_allocator.kept_bytes() == (0 if served else _MB)
    del held


def test_the_smallest_block_that_fits_is_taken() -> None:
    blocks = [make(size) for size in (3 * _MB // 2, _MB, 2 * _MB)]
    del blocks
    held = make(_MB)
    assert cpu_allocator.kept_bytes() == 7 * _MB // 2
    del held


def test_small_blocks_are_left_to_malloc() -> None:
    make(_KB - 1)
    assert cpu_allocator.kept_bytes() == 0
    make(_KB)
    assert cpu_allocator.kept_bytes() == _KB


def test_other_tensors_of_the_process_have_nothing_to_do_with_it() -> None:
    make(_MB)
    other = _bytes(_MB)
    assert cpu_allocator.kept_bytes() == _MB
    del other
    assert cpu_allocator.kept_bytes() == _MB


def test_an_error_ends_its_call() -> None:
    def fail(size: int) -> Tensor:
        raise RuntimeError(f"{size} is too much")

    with pytest.raises(RuntimeError, match="7 is too much"):
        cpu_allocator.reusing(fail)(7)
    _bytes(_MB)
    assert cpu_allocator.kept_bytes() == 0


def test_a_call_in_a_call_ends_only_itself() -> None:
    def outer(size: int) -> Tensor:
        make(_KB)
        return _bytes(size)

    cpu_allocator.reusing(outer)(_MB)
    assert cpu_allocator.kept_bytes() == _MB + _KB


def test_what_64_calls_did_not_need_goes_back() -> None:
    make(_MB)
    counts = []
    for _ in range(3 * 64):
        make(4 * _KB)
        counts.append(cpu_allocator.kept_bytes())
    assert counts[62] == _MB + 4 * _KB
    assert counts[-1] == 4 * _KB


def test_a_tensor_grows_as_any_other() -> None:
    tensor = make(_MB).fill_(3)
    tensor.resize_(2 * _MB)
    assert tensor[:_MB].eq(3).all()
    assert cpu_allocator.kept_bytes() == _MB


def test_an_array_over_a_tensor_keeps_its_block() -> None:
    array = make(_MB).fill_(3).numpy()
    make(_MB).fill_(5)
    assert (array == 3).all()


def test_a_view_keeps_its_block() -> None:
    view = make(_MB).fill_(3)[10:20]
    make(_MB).fill_(5)
    assert view.eq(3).all()


_FAIL = """
import torch
from fxopt import cpu_allocator

make = cpu_allocator.reusing(lambda count: torch.empty(count, dtype=torch.uint8))
make(1 << 20)
try:
    make(1 << 60)
except RuntimeError as error:
    print(error)
print(cpu_allocator.kept_bytes(), make(1 << 20).numel())
"""


def test_an_allocation_that_fails_says_so_as_before_and_empties_the_pool() -> None:
    # In another process: glibc goes on in another of its arenas once it has failed.
    run = subprocess.run([sys.executable, "-c", _FAIL], check=True, capture_output=True, text=True)
    assert "can't allocate memory: you tried to allocate 1152921504606846976 bytes" in run.stdout
    assert run.stdout.endswith("0 1048576\n")


_steps = st.lists(st.tuples(st.integers(_KB // 2, 8 * _KB), st.integers(0, 12)), max_size=60)


@given(_steps)
def test_tensors_keep_their_values_whatever_is_freed_beside_them(
    steps: list[tuple[int, int]],
) -> None:
    alive: dict[int, Tensor] = {}
    for number, (size, place) in enumerate(steps):
        alive.pop(place, None)
        alive[place + 13 * (number % 2)] = make(size).fill_(number % 251)
        alive[place] = make(size).fill_((number + 100) % 251)
        for tensor in alive.values():
            assert tensor.eq(tensor[0]).all()
    ends = sorted((tensor.data_ptr(), tensor.numel()) for tensor in alive.values())
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(ends))


def test_threads_share_it() -> None:
    wrong = []

    def work(value: int) -> None:
        alive: list[Tensor] = []
        for turn in range(400):
            alive.append(make(_KB * (1 + (turn * value) % 5)).fill_(value))
            if len(alive) > 6:
                wrong.extend(t for t in alive if not t.eq(value).all())
                del alive[turn % 3 :: 2]

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_another_thread_frees_comes_back() -> None:
    held = [make(_MB)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert cpu_allocator.kept_bytes() == _MB


def test_without_a_compiler_calls_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: str) -> Any:
        raise InvalidCxxCompiler

    monkeypatch.setattr(pool, "build", fail)
    found = pool._pool
    found.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not cpu_allocator.load()
        assert cpu_allocator.reusing(_bytes) is _bytes
        assert cpu_allocator.kept_bytes() == 0
        cpu_allocator.release()
        assert "compiled programs take their memory anew at each call: " in caplog.text
    finally:
        found.cache_clear()


def _block() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)
    ).eval()


def _lowered(passes: str) -> tuple[Callable[..., Any], Tensor]:
    x = torch.randn(512, 256)
    return fxopt.transform(_block(), passes, example_inputs=(x,), measure_cost=False), x


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
@pytest.mark.parametrize("passes", ["lower", "int8-linear, lower", "lower{mode=reduce-overhead}"])
def test_a_lowered_model_takes_no_fresh_memory(passes: str) -> None:
    run, x = _lowered(passes)

    def faults() -> int:
        ctypes.CDLL(None).malloc_trim(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for _ in range(3):
        faults()
    # Its intermediate results alone are 512 pages or more. Where oneDNN has no int8 dot product it
    # takes some 100 pages a product from the C library itself, for sums of its own.
    of_the_library = 0 if "int8" not in passes or takes_full_range() else 200
    assert sorted(faults() for _ in range(5))[2] < 100 + of_the_library


def test_what_a_program_kept_goes_with_it() -> None:
    run, x = _lowered("lower")
    for _ in range(2):
        run(x)
    assert cpu_allocator.kept_bytes() > 0
    del run
    torch.compiler.reset()
    gc.collect()
    assert cpu_allocator.kept_bytes() == 0


@pytest.mark.skipif(peak_memory(lambda: None, "cpu") is None, reason="no resident peak here")
def test_what_a_call_takes_from_the_pool_counts_for_its_peak() -> None:
    def call() -> Tensor:
        return make(32 * _MB).fill_(1)

    found = peak_memory(call, "cpu")
    assert found is not None
    assert found.bytes > 30 * _MB
