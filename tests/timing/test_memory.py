import pytest
import torch

from fxopt.timing import Memory, memory, peak_memory

_MB = 1_000_000


def measurable() -> bool:
    return peak_memory(lambda: None, "cpu") is not None


needs_reading = pytest.mark.skipif(not measurable(), reason="no resident peak on this system")


@needs_reading
@pytest.mark.parametrize("megabytes", [4, 64])
def test_a_call_needs_what_it_allocates(megabytes):
    found = peak_memory(lambda: torch.ones(megabytes * _MB, dtype=torch.uint8), "cpu")
    assert found is not None
    assert found.source == "resident memory"
    assert abs(found.bytes - megabytes * _MB) < 0.05 * megabytes * _MB + _MB


@needs_reading
def test_what_is_freed_during_the_call_counts_at_its_peak():
    def call() -> torch.Tensor:
        return torch.ones(32 * _MB, dtype=torch.uint8).sum()

    found = peak_memory(call, "cpu")
    assert found is not None
    assert found.bytes > 30 * _MB


@needs_reading
def test_many_small_tensors_count_each_time():
    def call() -> list[torch.Tensor]:
        return [torch.ones(100_000, dtype=torch.uint8) for _ in range(200)]

    first, second = peak_memory(call, "cpu"), peak_memory(call, "cpu")
    assert first is not None
    assert second is not None
    assert min(first.bytes, second.bytes) > 18 * _MB


def test_none_for_a_device_that_cannot_be_read():
    assert peak_memory(lambda: None, "meta") is None


def test_none_where_the_system_gives_no_reading(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    assert peak_memory(lambda: torch.ones(_MB), "cpu") is None


def test_none_where_the_trial_is_not_seen(monkeypatch):
    monkeypatch.setattr(memory, "_resident_peak", lambda call: 0)
    assert peak_memory(lambda: torch.ones(_MB), "cpu") is None


def test_text():
    assert str(Memory(52_400_000, "resident memory")) == "52.4 MB (resident memory)"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_peak():
    found = peak_memory(lambda: torch.ones(64 * _MB, dtype=torch.uint8, device="cuda"), "cuda")
    assert found is not None
    assert found.source == "CUDA allocator"
    assert abs(found.bytes - 64 * _MB) < _MB
