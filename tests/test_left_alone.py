"""A transform leaves the model, its Python attributes, the inputs and the generators as they were."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.capture import attributes_kept
from fxopt.errors import CaptureError

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        result: Tensor = self.fc(x)
        return result


@pytest.mark.parametrize("passes", ["canonicalize", "int8-linear{where=always}", "lower"])
@pytest.mark.parametrize("verify", [True, False])
def test_inputs_that_the_model_writes_are_copied_for_runs_of_ours(
    passes: str, verify: bool
) -> None:
    model = WritesInput().eval()
    example, more, calibration = X.clone(), X.clone() * 2, X.clone() * 3
    opt = fxopt.transform(
        model, passes, example_inputs=(example,), verify=verify, verify_inputs=[(more,)],
        calibration=[(calibration,)],
    )  # fmt: skip
    assert torch.equal(example, X)
    assert torch.equal(more, X * 2)
    assert torch.equal(calibration, X * 3)
    mine, its = X.clone(), X.clone()
    expected, got = model(mine), opt(its)
    assert torch.equal(mine, its), "a call of the result writes as one of the original does"
    assert torch.allclose(expected, got, atol=0.1 if "int8" in passes else 1e-5)


class Thing:
    def __init__(self) -> None:
        self.count = 0


class Remembers(nn.Module):
    """Changes everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls, self.seen, self.ring = 0, [0], deque([1])
        self.table: dict[str, int] = OrderedDict(a=1, b=2)
        self.names, self.thing, self.nested = {"a"}, Thing(), ([0], {"k": [1]})
        self.cache = torch.zeros(3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.calls += 1
        self.seen.append(self.calls)
        self.ring.append(2)
        self.table.pop("a", None)
        self.table["c"] = 3
        self.names.add("b")
        self.thing.count += 1
        self.nested[0].append(1)
        self.nested[1]["k"].append(2)
        result: Tensor = self.fc(x)
        return result


def held(model: Remembers) -> Any:
    return (
        model.calls, list(model.seen), list(model.ring), list(model.table.items()),
        set(model.names), model.thing.count, model.nested, hasattr(model, "last"),
    )  # fmt: skip


@pytest.mark.parametrize("verify", [True, False])
def test_python_attributes_are_put_back(verify: bool) -> None:
    model, expected = Remembers().eval(), held(Remembers())
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,), verify=verify)
    assert held(model) == expected
    assert torch.equal(opt(X), model(X))
    if verify:
        (note,) = opt.report.notes
        assert note.startswith("forward sets calls, last, names, nested[0] and")
        assert note.endswith("on the model; calls of the result don't")


def test_attributes_are_put_back_after_a_run_that_fails() -> None:
    model, expected = Remembers().eval(), held(Remembers())
    with pytest.raises(fxopt.errors.InputError):
        fxopt.transform(model, "canonicalize", example_inputs=(X[:, :2],))
    assert held(model) == expected


def test_what_a_block_changes_is_named_and_put_back() -> None:
    model = Remembers()
    mean = model.mean
    with attributes_kept(model) as changed:
        model.mean = torch.ones(4)
        model.cache.add_(1)
        model.fc.note = "new"  # type: ignore[assignment]
        assert changed == []
    assert sorted(changed) == ["cache", "fc.note", "mean"]
    assert model.mean is mean
    assert torch.equal(model.cache, torch.zeros(3))
    assert not hasattr(model.fc, "note")


def test_state_in_attributes_that_answers_depend_on_is_refused() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = Counts()
    with pytest.raises(
        CaptureError, match=r"(?s)Counts keeps state in Python attributes \(calls\)"
    ):
        fxopt.transform(model, "canonicalize", example_inputs=(X,))
    assert model.calls == 0


@settings(max_examples=10)
@given(st.lists(st.sampled_from(["seen", "ring", "table", "thing"]), unique=True), st.booleans())
def test_whatever_a_model_stores_is_put_back(stored: list[str], verify: bool) -> None:
    class Stores(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            for name in stored:
                value = getattr(self, name)
                if isinstance(value, (list, deque)):
                    value.append(x)
                elif isinstance(value, dict):
                    value["x"] = [x]
                else:
                    value.x = x
            result: Tensor = self.fc(x)
            return result

    model, expected = Stores().eval(), held(Remembers())
    fxopt.transform(model, "canonicalize", example_inputs=(X,), verify=verify)
    assert held(model) == expected
    assert vars(model.thing) == {"count": 0}


class MonteCarlo(nn.Module):
    """Dropout that a model keeps on, before one that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        kept = functional.dropout(functional.relu(self.fc(x)), 0.5, training=True)
        result: Tensor = self.out(self.drop(kept))
        return result


class RandomAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.4)


@pytest.mark.parametrize("kind", [MonteCarlo, RandomAttention])
@pytest.mark.parametrize("passes", ["canonicalize", "fold-pruned,canonicalize", "fuse-linears"])
def test_dropout_that_a_model_keeps_on_stays_random(kind: type[nn.Module], passes: str) -> None:
    model, state = kind().eval(), torch.get_rng_state()
    x = X if kind is MonteCarlo else X[None]
    opt = fxopt.transform(model, passes, example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), state), "the user's generator was drawn from"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = opt(x), opt(x)
        torch.manual_seed(5)
        assert torch.allclose(first, model(x), atol=1e-6)
    assert not torch.equal(first, second)


def test_lowered_dropout_is_still_random_and_right_on_average() -> None:
    model = MonteCarlo().eval()
    opt = fxopt.transform(model, "lower", example_inputs=(X,))
    with torch.no_grad():
        mean = torch.stack([opt(X) for _ in range(3000)]).mean(0)
        kept = functional.relu(model.fc(X))
        assert not torch.equal(opt(X), opt(X))
        assert torch.allclose(mean, model.out(kept), atol=0.1)


def test_half_attention_over_no_keys_is_zero() -> None:
    q = torch.randn(2, 2, 5, 16).bfloat16()
    k = torch.randn(2, 2, 0, 16).bfloat16()
    expected = functional.scaled_dot_product_attention(q, k, k)
    got = torch.ops.fxopt.written_attention(q, k, k, None, False, 0.25)
    assert torch.equal(got, expected)
    assert got.shape == (2, 2, 5, 16)
