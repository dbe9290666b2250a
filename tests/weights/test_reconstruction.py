"""Reconstruction: never worse than zeroing, exact where it can be, and told where it can't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import PassError
from fxopt.observation import gram as gram_room
from fxopt.observation import observe
from fxopt.observation.gram import Gram, Product, as_product, grams
from fxopt.program import Program
from fxopt.weights.reconstruction import Removal, reconstruct, refuse_fit, removal_errors
from tests.rewriting.functions import calls, program_of

KINDS = ("linear", "no-bias", "conv1d-of-gpt2", "conv1d", "conv2d", "same", "pointwise")
BERT = BertConfig(
    vocab_size=50,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    num_labels=4,
)


def layer(kind: str, inner: int, outer: int) -> nn.Module:
    if kind == "conv1d-of-gpt2":
        module: nn.Module = Conv1D(outer, inner)
        nn.init.normal_(module.bias)
        return module
    made = {
        "linear": lambda: nn.Linear(inner, outer),
        "no-bias": lambda: nn.Linear(inner, outer, bias=False),
        "conv1d": lambda: nn.Conv1d(inner, outer, 3, stride=2, padding=2, dilation=2),
        "conv2d": lambda: nn.Conv2d(inner, outer, (2, 3), stride=(1, 2), padding=1),
        "same": lambda: nn.Conv2d(inner, outer, (2, 3), padding="same", dilation=(1, 2)),
        "pointwise": lambda: nn.Conv2d(inner, outer, 1, bias=False),
    }
    return made[kind]()


def shape_of(kind: str, batch: int, inner: int) -> tuple[int, ...]:
    if kind == "conv1d":
        return (batch, inner, 9)
    if kind in ("conv2d", "same", "pointwise"):
        return (batch, inner, 5, 6)
    return (batch, 7, inner)


def channel_axis(kind: str) -> int:
    return -1 if kind in ("linear", "no-bias", "conv1d-of-gpt2") else 1


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, list[Tensor], Tensor, int]:
    """A float64 layer, batches of correlated inputs with a mean, what to keep, and its axis."""
    kind = draw(st.sampled_from(KINDS))
    inner, outer = draw(st.integers(2, 9)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module, axis = layer(kind, inner, outer).double().eval(), channel_axis(kind)
    mixing, mean = torch.randn(inner, inner), draw(st.sampled_from([0.0, 3.0]))
    count = draw(st.integers(1, 3))
    batches = [
        (torch.randn(shape_of(kind, 2, inner)).movedim(axis, -1) @ mixing + mean)
        .movedim(-1, axis)
        .double()
        for _ in range(count)
    ]
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=inner, max_size=inner)))
    return module, batches, kept, axis


def calibrated(module: nn.Module, batches: Sequence[Tensor]) -> Program:
    program = capture(module, (batches[0],))
    source = [(batch,) for batch in batches]
    return replace(program, calibration=Calibration(source, program.signature))


def reader_of(program: Program) -> str:
    (node,) = (node for node in calls(program) if not isinstance(as_product(node), str))
    return node.name


def outputs(module: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(batch).flatten() for batch in batches])


def refitted(module: nn.Module, fitted: Any) -> nn.Module:
    state = {"weight": fitted.weight}
    if fitted.bias is not None:
        state["bias"] = fitted.bias
    (prefix,) = {name.rpartition(".")[0] for name in module.state_dict()}
    module.load_state_dict({f"{prefix}.{name}".lstrip("."): one for name, one in state.items()})
    return module


def masked(batches: Sequence[Tensor], kept: Tensor, axis: int) -> list[Tensor]:
    return [(batch.movedim(axis, -1) * kept).movedim(-1, axis) for batch in batches]


def squared(difference: Tensor) -> float:
    return float(difference.square().sum())


@given(layers(), st.sampled_from([1e-8, 1e-4, 1.0]))
def test_it_is_never_worse_than_zeroing(drawn: Any, damping: float) -> None:
    module, batches, kept, axis = drawn
    program = calibrated(module, batches)
    name = reader_of(program)
    fitted = reconstruct(program, {name: kept}, damping)[name]
    expected = outputs(module, batches)
    zeroed = squared(outputs(module, masked(batches, kept, axis)) - expected)
    dropped = fitted.weight.movedim(_inputs(module), 0)[~kept]
    assert not bool(dropped.any()), "a cut channel has a weight"
    after = squared(outputs(refitted(module, fitted), batches) - expected)
    size = squared(expected)
    assert after <= zeroed * (1 + 1e-9) + 1e-18 * size
    # The errors that it tells are the true ones, a row having all outputs of one position.
    rows = expected.numel() // _outer(module)
    assert fitted.error_before * rows == pytest.approx(zeroed, rel=1e-6, abs=1e-9 * size)
    assert fitted.error_after * rows == pytest.approx(after, rel=1e-6, abs=1e-9 * size)


def _inputs(module: nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1


def _outer(module: nn.Module) -> int:
    return int(module.weight.shape[1 - _inputs(module)])


@given(layers())
def test_channels_that_the_others_tell_are_lost_without_error(drawn: Any) -> None:
    module, batches, kept, axis = drawn
    kept[0] = True
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        # At the border of a padded image, a combination of channels stays one, a mean doesn't.
        module.bias = None
    mixing = torch.randn(int(kept.sum()), int((~kept).sum()), dtype=torch.float64)
    for batch in batches:
        last = batch.movedim(axis, -1)
        last[..., ~kept] = last[..., kept] @ mixing
    program = calibrated(module, batches)
    name = reader_of(program)
    expected = outputs(module, batches)
    fitted = reconstruct(program, {name: kept}, 1e-13)[name]
    after = squared(outputs(refitted(module, fitted), batches) - expected)
    assert after <= 1e-12 * squared(expected)
    assert fitted.error_after <= 1e-9 * max(fitted.error_before, 1e-9)


def test_a_constant_moves_into_the_bias() -> None:
    module = nn.Linear(4, 3).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 1] = 7.0
    program = calibrated(module, [x])
    kept = torch.tensor([True, False, True, True])
    fitted = reconstruct(program, {"linear": kept})["linear"]
    assert fitted.error_after < 1e-20
    assert fitted.error_before > 1.0
    torch.testing.assert_close(fitted.bias, module.bias + 7.0 * module.weight[:, 1])
    torch.testing.assert_close(fitted.weight[:, kept], module.weight[:, kept].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_shapes_are_the_old_ones(dtype: torch.dtype) -> None:
    module = nn.Conv2d(4, 3, 3).to(dtype)
    program = calibrated(module, [torch.randn(2, 4, 6, 6, dtype=dtype)])
    before = module.weight.clone()
    fitted = reconstruct(program, {"conv2d": torch.tensor([True, False, True, True])})["conv2d"]
    assert fitted.weight.dtype == fitted.bias.dtype == dtype
    assert fitted.weight.shape == module.weight.shape
    assert fitted.weight.is_contiguous()
    assert torch.equal(module.weight, before)


class Shared(nn.Module):
    """One linear layer that two inputs meet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.linear(torch.sin(3 * x))


def test_a_shared_weight_is_fitted_to_all_its_inputs() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    module = Shared()
    program = calibrated(module, [x])
    kept = torch.tensor([True, True, False, True, False, True])
    fitted = reconstruct(program, {"linear": kept, "linear_1": kept}, 1e-10)
    one, other = fitted.values()
    assert torch.equal(one.weight, other.weight)
    both = calibrated(module.linear, [torch.cat([x, torch.sin(3 * x)])])
    expected = reconstruct(both, {"linear": kept}, 1e-10)["linear"]
    torch.testing.assert_close(one.weight, expected.weight)
    torch.testing.assert_close(one.bias, expected.bias)
    with pytest.raises(PassError, match=r"share the weight linear\.weight, so they must keep the"):
        reconstruct(program, {"linear": kept, "linear_1": ~kept})


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_removal_errors_are_those_of_refitting_without_the_column(
    inner: int, outer: int, seed: int, tall: bool
) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(3 * inner, inner, dtype=torch.float64) @ torch.randn(inner, inner).double()
    weight = torch.randn(outer + 3 * inner * tall, inner, dtype=torch.float64)
    found = removal_errors(rows.t() @ rows, weight, damping=0.0)
    y = rows @ weight.t()
    for column in range(inner):
        others = [other for other in range(inner) if other != column]
        expected = refit_error(rows[:, others], y)
        assert float(found[column]) == pytest.approx(expected, rel=1e-6)


def refit_error(rows: Tensor, y: Tensor) -> float:
    if not rows.shape[1]:
        return squared(y)
    return squared(y - rows @ torch.linalg.lstsq(rows, y, driver="gelsd").solution)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_channels_that_leave_one_after_the_other_cost_what_they_cost_together(
    size: int, width: int, seed: int, tall: bool
) -> None:
    torch.manual_seed(seed)
    inner = size * width
    rows = torch.randn(4 * inner, inner, dtype=torch.float64)
    rows = rows @ torch.randn(inner, inner).double()
    weight = torch.randn(2 + 3 * inner * tall, inner, dtype=torch.float64)
    columns = torch.randperm(inner).view(size, width)
    y = rows @ weight.t()
    removal = Removal(rows.t() @ rows, weight, columns, 0.0)
    total, left = 0.0, list(range(size))
    for channel in torch.randperm(size)[: size - 1].tolist():
        left.remove(channel)
        alone = float(removal.errors()[channel])
        added = removal.remove(torch.tensor([channel]))
        assert added == pytest.approx(alone)
        total += added
        expected = refit_error(rows[:, columns[left].flatten()], y)
        assert total == pytest.approx(expected, rel=1e-5)
        assert float(removal.errors()[channel]) == 0.0
    pair = torch.arange(2)
    joint = Removal(rows.t() @ rows, weight, columns, 0.0).remove(pair)
    assert joint == pytest.approx(refit_error(rows[:, columns[2:].flatten()], y), rel=1e-5)
    found = removal_errors(rows.t() @ rows, weight, columns, 0.0)
    assert float(found[0]) == pytest.approx(
        refit_error(rows[:, columns[1:].flatten()], y), rel=1e-5
    )


def test_a_column_that_was_never_used_costs_nothing() -> None:
    rows = torch.randn(30, 5)
    rows[:, 3] = 0.0
    found = removal_errors(rows.t() @ rows, torch.randn(4, 5))
    assert int(found.argmin()) == 3
    assert float(found[3]) < 1e-3 * float(found.sort().values[1])


@given(st.integers(0, 2**31), st.sampled_from([3, 64, 4096]))
def test_a_gram_matrix_is_that_of_all_finite_rows(seed: int, block: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(20, 10)
    gram = Gram(10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_room, "_COLUMNS", block)
        gram.add(rows[:8])
        assert torch.allclose(gram.moment, (rows[:8].t() @ rows[:8]).double(), atol=1e-5)
        with_infinity = rows[8:].clone()
        with_infinity[0, 1] = torch.inf
        gram.add(with_infinity)
        kept = torch.cat([rows[:8], rows[9:]]).double()
        torch.testing.assert_close(gram.moment, kept.t() @ kept)
        torch.testing.assert_close(gram.centred(), kept.t().cov(correction=0) * 19)
    assert gram.rows == 19


def test_products_of_one_input_share_a_matrix_and_waves_bound_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = [torch.randn(3, 6), torch.randn(2, 6), torch.randn(4, 3)]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = nn.functional.linear(x, weights[0])
        return y, nn.functional.linear(x, weights[1]), nn.functional.linear(y, weights[2])

    program = program_of(function, torch.randn(5, 6))
    products = [one for one in map(as_product, calls(program)) if isinstance(one, Product)]
    runs = []
    monkeypatch.setattr(gram_room, "observe", lambda *args: runs.append(observe(*args)))
    sets = [(product,) for product in products]
    first, second, third = (gram for _, gram in grams(program, sets))
    assert first is second
    assert third.moment.shape == (3, 3)
    assert len(runs) == 1
    monkeypatch.setattr(gram_room, "_WAVE_BYTES", 8 * 6 * 6)
    again = [gram for _, gram in grams(program, sets)]
    assert len(runs) == 3
    assert all(
        torch.equal(one.moment, other.moment)
        for one, other in zip(again, (first, second, third), strict=True)
    )


def test_large_images_give_evenly_spread_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_room, "_PATCHES", 10)
    program = capture(nn.Conv2d(3, 2, 3), (torch.randn(2, 3, 12, 12),))
    (product,) = (as_product(node) for node in calls(program))
    assert isinstance(product, Product)
    x = torch.arange(2 * 3 * 144.0).view(2, 3, 12, 12)
    patches = list(product.rows(x))
    assert [patch.shape for patch in patches] == [(10, 27), (10, 27)]
    assert patches[0][:, 0].tolist() == [(i * 10) // 10 * 12 for i in range(10)]


def test_few_rows_warn() -> None:
    program = calibrated(nn.Linear(6, 2), [torch.randn(4, 6)])
    kept = torch.tensor([True] * 5 + [False])
    fitted = reconstruct(program, {"linear": kept})["linear"]
    assert fitted.warning == (
        "linear was fitted to 4 rows of 6 columns, which says little of other inputs: give "
        "calibration= more of them"
    )
    program = calibrated(nn.Linear(6, 2), [torch.randn(40, 6)])
    assert reconstruct(program, {"linear": kept})["linear"].warning is None


@pytest.mark.parametrize("kept", [True, False])
def test_all_and_nothing(kept: bool) -> None:
    module = nn.Linear(5, 2).double()
    x = torch.randn(20, 5).double()
    program = calibrated(module, [x])
    fitted = reconstruct(program, {"linear": torch.full((5,), kept)})["linear"]
    if kept:
        assert torch.equal(fitted.weight, module.weight.detach())
        assert torch.equal(fitted.bias, module.bias.detach())
        assert fitted.error_before == fitted.error_after == 0.0
    else:
        assert not bool(fitted.weight.any())
        torch.testing.assert_close(fitted.bias, module(x).detach().mean(0))


def test_inputs_that_are_all_zero_leave_the_weight() -> None:
    module = nn.Linear(4, 2)
    program = calibrated(module, [torch.zeros(3, 4)])
    kept = torch.tensor([True, False, True, True])
    fitted = reconstruct(program, {"linear": kept})["linear"]
    assert torch.equal(fitted.weight[:, kept], module.weight[:, kept].detach())


def test_what_cannot_be_fitted_is_refused_with_a_reason() -> None:
    cases = [
        (nn.Conv2d(4, 4, 3, groups=2), (1, 4, 5, 5), "a convolution in 2 groups"),
        (nn.Conv3d(4, 4, 1), (1, 4, 2, 2, 2), "is neither a linear layer nor a convolution of one"),
        (nn.Conv2d(4, 4, 3), (4, 5, 5), "a convolution without a batch"),
    ]
    for module, shape, reason in cases:
        program = capture(module, (torch.randn(shape),))
        node = calls(program)[0] if len(calls(program)) == 1 else None
        if node is None:
            continue
        assert reason in (refuse_fit(node) or "")
        with pytest.raises(PassError, match=rf"{node.name}.* can't be refitted: .*{reason}"):
            reconstruct(program, {node.name: torch.ones(4, dtype=torch.bool)})
    program = program_of(
        lambda x, w: nn.functional.conv2d(x, w), torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)
    )
    assert refuse_fit(calls(program)[0]) == "its weight is computed"


def test_wrong_arguments_say_what_to_give() -> None:
    program = calibrated(nn.Linear(4, 2), [torch.randn(8, 4)])
    whole = torch.ones(4, dtype=torch.bool)
    with pytest.raises(PassError, match=r"no node of the program is called 'head'"):
        reconstruct(program, {"head": whole})
    with pytest.raises(PassError, match=r"the mask of linear is torch.int64 of \(4,\); give bool"):
        reconstruct(program, {"linear": whole.long()})
    with pytest.raises(PassError, match=r"of \(3,\); give bool of \(4,\), True for what it keeps"):
        reconstruct(program, {"linear": whole[1:]})
    with pytest.raises(PassError, match=r"damping=2.0\): give a share between 0 and 1"):
        reconstruct(program, {"linear": whole}, 2.0)
    with pytest.raises(PassError, match=r"the Gram matrix stays indefinite with its mean diagonal"):
        removal_errors(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), torch.ones(1, 2))
    assert refuse_fit(next(node for node in calls(program))) is None


class Windowed(nn.Module):
    """A layer of which some positions alone reach the output."""

    def __init__(self, module: nn.Module, counts: Tensor) -> None:
        super().__init__()
        self.module, self.counts = module, counts

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.counts


@given(layers(), st.integers(0, 2**31))
def test_rows_that_no_output_feels_count_for_nothing(drawn: Any, seed: int) -> None:
    module, batches, kept, axis = drawn
    expected = outputs(module, batches)
    places = module(batches[0]).movedim(axis, -1).shape[1:-1]
    torch.manual_seed(seed)
    counts = (torch.rand(places) < 0.6).double()
    around = Windowed(module, counts.unsqueeze(-1) if axis == -1 else counts.unsqueeze(0))
    program = calibrated(around, batches)
    name = reader_of(program)
    uniform = reconstruct(program, {name: kept}, 1e-8)[name]
    fitted = reconstruct(program, {name: kept}, 1e-8, "fisher")[name]
    before = squared(outputs(around, batches))

    def error(one: Any) -> float:
        module.load_state_dict({**module.state_dict(), "weight": one.weight})
        if one.bias is not None:
            module.load_state_dict({**module.state_dict(), "bias": one.bias})
        return squared(outputs(around, batches) - felt)

    felt = outputs(around, batches)
    assert error(fitted) <= error(uniform) * (1 + 1e-6) + 1e-12 * (before + squared(expected))


def test_every_row_counts_the_same_where_every_error_does() -> None:
    module, x = nn.Linear(6, 4).double(), torch.randn(40, 6).double()
    kept = torch.tensor([True, False, True, True, False, True])
    program = calibrated(module, [x[:25], x[25:]])
    uniform = reconstruct(program, {"linear": kept})["linear"]
    fitted = reconstruct(program, {"linear": kept}, weighting="fisher")["linear"]
    torch.testing.assert_close(fitted.weight, uniform.weight)
    torch.testing.assert_close(fitted.bias, uniform.bias)
    assert fitted.error_after == pytest.approx(uniform.error_after)


def test_what_padding_holds_changes_nothing_under_fisher() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT).eval()
    mask = torch.ones(8, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    ids = torch.randint(0, 50, (8, 6))
    others = ids.clone()
    others[:, 4:] = 7
    kept = torch.arange(16) % 2 == 0
    fitted: dict[str, list[Tensor]] = {"uniform": [], "fisher": []}
    for given_ids in (ids, others):
        program = capture(model, {"input_ids": given_ids, "attention_mask": mask})
        (name,) = (
            node.name
            for node in calls(program)
            if isinstance(product := as_product(node), Product)
            and str(product.weight.target).endswith("encoder.layer.0.output.dense.weight")
        )
        for weighting, weights in fitted.items():
            weights.append(reconstruct(program, {name: kept}, weighting=weighting)[name].weight)
    assert not torch.allclose(*fitted["uniform"], rtol=1e-3)
    torch.testing.assert_close(*fitted["fisher"], rtol=1e-4, atol=1e-6)


def test_few_effective_rows_warn() -> None:
    module = nn.Sequential(nn.Linear(6, 2), nn.Softmax(-1))
    counts = torch.zeros(40, 1)
    counts[:4] = 1.0
    program = calibrated(Windowed(module[0], counts), [torch.randn(40, 6)])
    name = reader_of(program)
    kept = torch.tensor([True] * 5 + [False])
    warning = reconstruct(program, {name: kept}, weighting="fisher")[name].warning
    assert warning is not None
    assert "was fitted to 40 rows, by their weights worth 4, of 6 columns" in warning


def test_an_unknown_weighting_and_a_missing_gradient_say_what_to_give() -> None:
    kept = torch.tensor([True, False, True])
    program = calibrated(nn.Linear(3, 2), [torch.randn(8, 3)])
    with pytest.raises(PassError, match=r"weighting='hessian': give one of uniform, fisher"):
        reconstruct(program, {"linear": kept}, weighting="hessian")  # type: ignore[arg-type]

    class Index(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    program = calibrated(Index(3, 2), [torch.randn(8, 3)])
    with pytest.raises(
        PassError, match=r'no output depends on these layers .* weighting="uniform"'
    ):
        reconstruct(program, {reader_of(program): kept}, weighting="fisher")
