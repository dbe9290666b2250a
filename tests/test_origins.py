"""The original changed in place after the transform: refused, never half seen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import ModelError
from fxopt.optimized import Origins

X = torch.linspace(-1.0, 1.0, 48).reshape(4, 12)
INT8 = "int8-linear{where=always}"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 12)).eval()


def stepped(model: nn.Module, **options: bool) -> None:
    model(X).sum().backward()
    torch.optim.AdamW(model.parameters(), **options).step()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda m: m.load_state_dict(
        {name: value + 1 for name, value in m.state_dict().items()}
    ),
    "an optimizer's step": stepped,
    "a fused optimizer's step": lambda m: stepped(m, fused=True),
    "half()": lambda m: m.half(),
    "data": lambda m: [p.data.add_(1) for p in m.parameters()],
    "another storage": lambda m: nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in m.parameters())), m.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_was_derived_from_is_refused_at_the_next_call(change: str) -> None:
    original = model()
    opt = fxopt.transform(original, INT8, example_inputs=(X,))
    opt(X)
    CHANGES[change](original)
    with pytest.raises(ModelError, match=r"\d\.weight of the original model was changed in place"):
        opt(X)
    with pytest.raises(ModelError, match="Transform the model again"):
        opt.program  # noqa: B018


@settings(max_examples=10)
@given(
    st.sampled_from(range(6)), st.sampled_from([INT8, "canonicalize", "prepack", INT8 + ",prepack"])
)
def test_a_change_is_seen_or_refused(index: int, passes: str) -> None:
    original = model()
    opt = fxopt.transform(original, passes, example_inputs=(X,))
    with torch.no_grad():
        list(original.parameters())[index].mul_(-3)
        expected = original(X)
    try:
        got = opt(X)
    except ModelError:
        return
    bound = 0.05 if "int8" in passes else 1e-5
    assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_a_copy_of_its_own_and_a_loaded_one_go_on(tmp_path: object) -> None:
    original = model()
    opt = fxopt.transform(original, INT8, example_inputs=(X,))
    twin = copy.deepcopy(opt)
    expected = opt(X)
    opt.save(f"{tmp_path}/saved")
    CHANGES["load_state_dict"](original)
    assert torch.equal(twin(X), expected)
    assert torch.equal(fxopt.load(f"{tmp_path}/saved")(X), expected)


def test_a_second_transform_inherits_what_the_first_was_derived_from() -> None:
    original = model()
    opt = fxopt.transform(original, INT8, example_inputs=(X,))
    again = fxopt.transform(opt, "canonicalize,prepack", example_inputs=(X,))
    again(X)
    CHANGES["load_state_dict"](original)
    with pytest.raises(ModelError, match="was changed in place"):
        again(X)


def test_training_what_is_shared_is_not_a_change() -> None:
    original = model().train()
    opt = fxopt.transform(original, "fuse-linears,canonicalize", example_inputs=(X,), mode="train")
    stepped(opt)
    assert torch.allclose(opt(X), original(X), atol=1e-5)


def test_runs_of_ours_are_not_a_change() -> None:
    original = model()
    opt = fxopt.transform(original, INT8, example_inputs=(X,))
    fxopt.transform(original, INT8, example_inputs=(X,))
    with pytest.raises(fxopt.errors.FxoptError):
        fxopt.transform(original, INT8, example_inputs=(X[:, :5],))
    opt(X)


def test_the_report_says_so() -> None:
    opt = fxopt.transform(model(), INT8, example_inputs=(X,))
    assert any("weights were derived from 2 tensors" in note for note in opt.report.notes)
    assert fxopt.transform(model(), "canonicalize", example_inputs=(X,)).report.notes == ()


def test_what_is_watched_is_not_kept_alive() -> None:
    freed: list[bool] = []

    class Noted(nn.Parameter):
        def __del__(self) -> None:
            freed.append(True)

    origins = Origins({"w": Noted(torch.ones(3))})
    assert freed == [True]
    origins.check()


def test_an_entry_that_is_nan_is_equal_to_itself() -> None:
    tensor: Tensor = torch.full((3,), torch.nan)
    origins = Origins({"w": tensor})
    origins.check()
    tensor.data.fill_(1)
    with pytest.raises(ModelError, match="w of the original"):
        origins.check()
