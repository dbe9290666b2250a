"""A graph holds for the branches that its capture took; other calls get another graph, or a name.

Every expected value is the eager model's own.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.errors import InputError, ModelError, PassError
from fxopt.report import Report

_WIDTH = 16


class Sized(nn.Module):
    """A linear, and what `after` makes of its result and its input."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(_WIDTH, _WIDTH)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.l(x), x)


def _one_step(y: Tensor, x: Tensor) -> Tensor:
    return y * 2 if x.shape[1] == 1 else y - y.mean(1, keepdim=True)


def _long(y: Tensor, x: Tensor) -> Tensor:
    return y * 2 if x.shape[1] > 200 else y - 1


def _padded(y: Tensor, x: Tensor) -> Tensor:
    if x.shape[1] % 4:
        y = functional.pad(y, (0, 0, 0, 4 - x.shape[1] % 4))
    return y


def _even(y: Tensor, x: Tensor) -> Tensor:
    if x.shape[1] % 2:
        y = y[:, :-1]
    return y


def _one_row(y: Tensor, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        y = y.squeeze(0)
    return y * 2


def _square(y: Tensor, x: Tensor) -> Tensor:
    return y + 1 if x.shape[0] == x.shape[1] else y * 2


def _product(y: Tensor, x: Tensor) -> Tensor:
    return y + 1 if x.shape[0] * x.shape[1] > 30 else y * 2


def _none(y: Tensor, x: Tensor) -> Tensor:
    return y * 2 + 1 if x.shape[1] == 0 else y.sum(1, keepdim=True)


def _hidden_squeeze(y: Tensor, x: Tensor) -> Tensor:
    y = y.squeeze(1)
    return y * 3 if y.dim() == 3 else y * 5


CASES: dict[str, tuple[Any, tuple[int, int], tuple[int, int], str]] = {
    "one step": (_one_step, (4, 12), (4, 1), "x.shape[1] == 1 takes another branch"),
    "long": (_long, (2, 600), (2, 100), "x.shape[1] <= 200 takes another branch"),
    "padded": (_padded, (4, 12), (4, 13), "(x.shape[1] % 4) != 0 takes another branch"),
    "not padded": (_padded, (4, 13), (4, 12), "(x.shape[1] % 4) == 0 takes another branch"),
    "even": (_even, (4, 12), (4, 7), "(x.shape[1] % 2) != 0 takes another branch"),
    "one row": (_one_row, (4, 12), (1, 12), "x.shape[0] == 1 takes another branch"),
    "square": (_square, (4, 12), (5, 5), "x.shape[0] == x.shape[1] takes another branch"),
    "not square": (_square, (4, 4), (4, 5), "x.shape[0] != x.shape[1] takes another branch"),
    "product": (_product, (4, 12), (4, 3), "(x.shape[1] * x.shape[0]) <= 30 takes another"),
    "none": (_none, (4, 12), (4, 0), "x.shape[1] < 1 takes another branch"),
    "squeeze": (_hidden_squeeze, (4, 12), (4, 1), "x.shape[1] == 1 changes what an operator"),
}


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, _WIDTH, generator=torch.Generator().manual_seed(1))


def _transform(model: nn.Module, *shape: int, **options: Any) -> fxopt.Optimized:
    passes = options.pop("passes", "canonicalize")
    return fxopt.transform(model.eval(), passes, example_inputs=(_x(*shape),), **options)


@pytest.mark.parametrize("name", CASES)
def test_a_call_of_another_branch_is_eagers(name: str) -> None:
    after, example, other, _ = CASES[name]
    model = Sized(after)
    opt = _transform(model, *example)
    assert len(opt.programs) == 1
    for shape in (other, example, other):
        torch.testing.assert_close(opt(_x(*shape)), model(_x(*shape)), equal_nan=True)
    assert len(opt.programs) == 2, "one for each side, each captured once"


@pytest.mark.parametrize("name", CASES)
def test_without_recapture_it_is_refused_by_name(name: str) -> None:
    after, example, other, relation = CASES[name]
    opt = _transform(Sized(after), *example, recapture="error")
    with pytest.raises(InputError) as caught:
        opt(_x(*other))
    assert str(caught.value).startswith(relation), str(caught.value)
    assert " at test_size_guards.py:" in str(caught.value)
    assert "Transform the model again with example_inputs of these sizes." in str(caught.value)


def test_sizes_that_are_the_same_branch_need_no_other_program() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12)
    for shape in ((1, 12), (7, 2), (0, 5), (3, 40)):
        torch.testing.assert_close(opt(_x(*shape)), model(_x(*shape)))
    assert len(opt.programs) == 1


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2,
            image_size=16, patch_size=8,
        )
    ).eval()  # fmt: skip


def test_dinov2_runs_at_the_configured_size_and_at_others() -> None:
    model = _dinov2()
    opt = fxopt.transform(model, "canonicalize")
    for height, width in ((16, 16), (32, 24), (24, 24), (16, 16)):
        pixels = torch.randn(2, 3, height, width)
        torch.testing.assert_close(
            opt(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    assert len(opt.programs) == 2


def test_programs_share_what_is_the_models_and_what_passes_made_alike() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12, passes="int8-linear{mode=weight_only}")
    opt(_x(4, 1))
    first, second = opt.programs
    assert first.state.keys() == second.state.keys()
    assert all(second.state[name] is tensor for name, tensor in first.state.items())
    assert list(opt.state_dict()) == list(first.state)


def test_a_bound_on_programs_is_kept_and_named() -> None:
    model = Sized(lambda y, x: y * int(x.shape[1]))
    opt = _transform(model, 2, 3, recapture=3)
    for length in (4, 5, 4, 3):
        torch.testing.assert_close(opt(_x(2, length)), model(_x(2, length)))
    with pytest.raises(InputError) as caught:
        opt(_x(2, 6))
    assert "x.shape[1] != 3 takes another branch at test_size_guards.py:" in str(caught.value)
    assert "3 programs are held already" in str(caught.value)
    torch.testing.assert_close(opt(_x(2, 5)), model(_x(2, 5)))


@pytest.mark.parametrize("value", ["never", 0, True, 1.5])
def test_another_word_for_recapture_is_refused(value: Any) -> None:
    with pytest.raises(PassError, match=f"recapture={value!r}: must be 'auto', 'error' or how"):
        _transform(Sized(_one_step), 4, 12, recapture=value)


def test_changed_weights_make_no_mixture() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12, passes="int8-linear{mode=weight_only}")
    with torch.no_grad():
        next(iter(opt.buffers())).data.mul_(2)  # past autograd's version counters
    with pytest.raises(InputError, match="No program can be captured for it: weights of this mod"):
        opt(_x(4, 1))


def test_a_changed_original_makes_no_mixture() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12, passes="int8-linear{mode=weight_only}")
    model.l.weight.data.mul_(2)
    with pytest.raises((InputError, ModelError), match=r"of the original model w.* changed"):
        opt(_x(4, 1))


def test_training_what_is_shared_trains_both_programs() -> None:
    model = Sized(_one_step)
    opt = fxopt.transform(model, "canonicalize", example_inputs=(_x(4, 12),), mode="train")
    expected = copy.deepcopy(model).train()
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (opt, expected)]
    for shape in ((4, 12), (4, 1), (4, 12), (4, 1), (4, 7)):
        for one, optimizer in zip((opt, expected), optimizers, strict=True):
            optimizer.zero_grad()
            one(_x(*shape)).square().mean().backward()
            optimizer.step()
    assert len(opt.programs) == 2
    torch.testing.assert_close(opt.state_dict(), expected.state_dict())
    opt.eval()
    torch.testing.assert_close(opt(_x(3, 1)), expected.eval()(_x(3, 1)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1)).reshape(x.shape)
        return y * 2 if x.shape[1] == 1 else y + 1


def test_running_statistics_are_one_for_all_programs_and_not_the_models() -> None:
    model = Normed()
    expected = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    opt = fxopt.transform(model, "canonicalize", example_inputs=(_x(4, 12),), mode="train")
    for shape in ((4, 12), (4, 1), (5, 3), (6, 1)):
        torch.testing.assert_close(opt(_x(*shape)), expected(_x(*shape)))
    torch.testing.assert_close(opt.state_dict(), expected.state_dict())
    torch.testing.assert_close(model.state_dict(), before)


def test_copies_hold_the_programs_and_capture_more() -> None:
    model = Sized(_square)
    opt = _transform(model, 4, 12)
    opt(_x(5, 5))
    twin = copy.deepcopy(opt)
    assert len(twin.programs) == 2
    assert twin.programs[1].state["l.weight"] is twin.programs[0].state["l.weight"]
    assert twin.programs[0].state["l.weight"] is not model.l.weight
    assert torch.equal(twin(_x(5, 5)), opt(_x(5, 5)))
    fresh = copy.deepcopy(_transform(model, 4, 12))
    torch.testing.assert_close(fresh(_x(3, 3)), model(_x(3, 3)))
    with torch.no_grad():
        fresh.programs[0].state["l.weight"].mul_(2)
    other = copy.deepcopy(_transform(model, 4, 12))
    other.load_state_dict({name: value * 2 for name, value in other.state_dict().items()})
    with pytest.raises(InputError, match="weights of this module were changed since"):
        other(_x(3, 3))


def test_a_move_that_changes_nothing_keeps_the_programs() -> None:
    opt = _transform(Sized(_square), 4, 12)
    expected = opt(_x(5, 5))
    assert torch.equal(opt.to("cpu").eval()(_x(5, 5)), expected)
    assert len(opt.programs) == 2


def test_saved_folders_hold_all_programs_and_name_other_branches(tmp_path: Path) -> None:
    model = Sized(lambda y, x: y * 2 if x.shape[1] == 1 else (y + 1 if x.shape[1] > 9 else y))
    opt = _transform(model, 4, 12, passes="int8-linear{mode=weight_only}")
    expected = {shape: opt(_x(*shape)) for shape in ((4, 12), (4, 1))}
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert len(loaded.programs) == 2
    first, second = loaded.programs
    assert all(second.state[name] is tensor for name, tensor in first.state.items())
    for shape, value in expected.items():
        assert torch.equal(loaded(_x(*shape)), value)
    assert loaded.report.domains == opt.report.domains
    with pytest.raises(InputError) as caught:
        loaded(_x(4, 5))
    assert "x.shape[1] <= 9 takes another branch at test_size_guards.py:" in str(caught.value)


def test_verify_inputs_of_another_branch_are_captured_at_once() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12, verify_inputs=[(_x(3, 1),), (_x(3, 5),)])
    assert len(opt.programs) == 2
    with pytest.raises(InputError, match=r"x.shape\[1\] == 1 takes another branch"):
        _transform(model, 4, 12, verify_inputs=[(_x(3, 1),)], recapture="error")


def test_calibration_batches_of_another_branch_are_passed_over() -> None:
    model = Sized(_one_step)
    batches = [(_x(4, 12),), (_x(4, 1) * 1e6,), (_x(2, 9),)]
    opt = _transform(
        model, 4, 12, passes="int8-linear{mode=static}", calibration=batches, budget=fxopt.Sqnr(20)
    )
    assert fxopt.Sqnr(25).measure(model(_x(4, 12)), opt(_x(4, 12))).holds


def test_the_original_is_kept_only_where_other_branches_may_need_it() -> None:
    model = Sized(_one_step)
    opt = _transform(model, 4, 12)
    expected = model(_x(4, 1))
    del model
    gc.collect()
    torch.testing.assert_close(opt(_x(4, 1)), expected)
    plain = Sized(lambda y, x: y.relu())
    gone = weakref.ref(plain)
    opt = _transform(plain, 4, 12)
    del plain
    gc.collect()
    assert gone() is None
    assert opt(_x(2, 3)).shape == (2, 3, _WIDTH)


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, shift: float | None = None) -> Tensor:
        y = x * scale
        return y if shift is None else y + shift


def test_a_constant_that_is_left_out_is_forwards_default() -> None:
    x, model = torch.randn(3, 4), Scaled()
    opt = fxopt.transform(model, "canonicalize", example_inputs={"x": x, "scale": 2.0})
    torch.testing.assert_close(opt(x, scale=2.0), x * 2)
    torch.testing.assert_close(opt(x), x)
    torch.testing.assert_close(opt(x, 1.0), x)
    torch.testing.assert_close(opt(x, 3.0), x * 3)
    assert len(opt.programs) == 3


def test_a_constant_that_is_left_out_is_refused_by_name_without_recapture() -> None:
    x = torch.randn(3, 4)
    inputs = {"x": x, "scale": 2.0, "shift": 1.0}
    opt = fxopt.transform(Scaled(), "canonicalize", example_inputs=inputs, recapture="error")
    with pytest.raises(InputError) as caught:
        opt(x, shift=1.0)
    assert str(caught.value) == (
        "this call leaves out scale, so that the model runs with scale=1.0, but the graph was "
        "captured with 2.0. Give scale=2.0 in the call, or transform the model again with "
        "example_inputs that leave it out."
    )
    with pytest.raises(InputError, match=r"this call leaves out shift, so that .* shift=None"):
        opt(x, scale=2.0)


def test_a_constant_that_was_never_given_needs_no_repeating() -> None:
    x = torch.randn(3, 4)
    opt = fxopt.transform(Scaled(), "canonicalize", example_inputs={"x": x, "scale": 1.0})
    torch.testing.assert_close(opt(x), x)
    assert len(opt.programs) == 1


def test_the_report_says_for_which_calls_it_holds() -> None:
    opt = _transform(Sized(_one_step), 4, 12)
    text = str(opt.report)
    assert "Holds for" in text
    assert "where        x.shape[1] != 1 (a branch at test_size_guards.py:" in text
    assert "judged at    x (4, 12, 16); x (1, 15, 16); x (5, 8, 16)" in text
    assert "1 of at most 8 so" in text
    opt(_x(4, 1))
    assert len(opt.report.domains) == 2
    assert Report.from_json(opt.report.to_json()) == opt.report
    assert "x.shape[1] != 1" in opt.report.to_html()
    refused = _transform(Sized(_one_step), 4, 12, recapture="error").report
    assert "refused by an InputError that names the relation" in " ".join(str(refused).split())


def test_the_example_is_within_its_own_program() -> None:
    """A batch of one is captured as two, and of two torch finds that the branch takes only two."""
    model = Sized(lambda y, x: y * 2 if (x.shape[0] + 1) // 2 == 1 else y + 1)
    opt = _transform(model, 1, 12, recapture="error")
    torch.testing.assert_close(opt(_x(1, 12)), model(_x(1, 12)))
    opt = _transform(model, 1, 12)
    for shape in ((1, 12), (2, 12), (3, 12), (1, 5)):
        torch.testing.assert_close(opt(_x(*shape)), model(_x(*shape)))
