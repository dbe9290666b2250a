"""Constant channels: each claimed constant against what is computed, and what must be found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional

from fxopt.analyses.constant_channels import Known, constant_channels
from fxopt.analyses.constant_channels.contraction import dead_rows
from fxopt.analyses.constant_channels.reshaping import reshaped
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.program import Program
from tests.architectures import ARCHITECTURES, randomize
from tests.idle_channels import idle
from tests.pruned_models import prunable_models
from tests.rewriting.functions import calls, program_of
from tests.sweeps import in_parts

aten = torch.ops.aten


def worst_errors(program: Program, facts: Any, inputs: Sequence[Tensor]) -> dict[str, float]:
    """By node, the largest difference of a claimed constant from what is computed, relative to the
    larger of 1 and the largest constant there."""
    worst: dict[str, float] = {}

    def look(node: fx.Node, value: Any) -> Any:
        known = facts.get(node)
        if known is not None:
            where = known.mask.expand(value.shape)
            wanted = known.values.double().expand(value.shape)[where]
            error = (value.double()[where] - wanted).abs()
            scale = max(1.0, float(wanted.abs().max()))
            worst[node.name] = float(error.nan_to_num(torch.inf).max()) / scale
        return value

    evaluate(program, inputs, look)
    return worst


def assert_true(program: Program, facts: Any, *inputs: Sequence[Tensor]) -> None:
    for given_inputs in inputs:
        wrong = {n: e for n, e in worst_errors(program, facts, given_inputs).items() if e > 1e-12}
        assert not wrong, f"claimed constants that aren't: {wrong}"


def fact_of_output(program: Program) -> Known | None:
    """What is known of the only output, checked against other inputs of the same shapes."""
    facts = constant_channels(program)
    others = [torch.randn_like(one) if one.is_floating_point() else one for one in program.example]
    assert_true(program, facts, program.example, others)
    (output,) = program.output.args[0]  # type: ignore[misc]
    return facts.get(output)  # type: ignore[arg-type]


def found(known: Known | None) -> list[float | None]:
    """The flat entries of a fact, None where they aren't known."""
    assert known is not None
    pairs = zip(known.mask.flatten().tolist(), known.values.flatten().tolist(), strict=True)
    return [value if mask else None for mask, value in pairs]


@in_parts(60)
@given(prunable_models(dtypes=st.just(torch.float64)), st.integers(0, 2**16))
def test_each_claimed_constant_is_one(drawn: Any, seed: int) -> None:
    model = idle(drawn.model, seed)
    program = capture(model, drawn.example)
    facts = constant_channels(program)
    given_inputs = [program.signature.flatten((), call) for call in (drawn.example, *drawn.others)]
    assert_true(program, facts, *given_inputs)
    for node, known in facts.items():
        value = node.meta["val"]
        assert known.mask.shape == known.values.shape
        assert known.ndim == value.ndim
        assert known.mask.any()
        assert known.values[known.mask].isfinite().all()
        for size, length in zip(value.shape, known.shape, strict=True):
            assert length == 1 or (isinstance(size, int) and size == length)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    "name",
    ["bert", "gpt2", "deberta-v2", "qwen3", "t5-encoder", "vit", "whisper-encoder", "cnn"],
)
def test_the_constants_of_each_architecture(name: str) -> None:
    case = ARCHITECTURES[name]()
    model = idle(case.model, 0).double()
    floats = {
        key: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
        for key, one in case.example.items()
    }
    program = capture(model, floats)
    facts = constant_channels(program)
    assert facts
    assert_true(program, facts, program.signature.flatten((), floats))


@given(st.integers(1, 5), st.integers(1, 70), st.data())
def test_dead_rows_against_all_entries(rows: int, columns: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    live = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.05]))
    weight = torch.where(live, torch.randn(rows, columns, generator=generator), 0.0)
    count = data.draw(st.sampled_from([1, rows]))
    unknown = torch.rand(count, columns, generator=generator) < 0.5
    expected = [row for row in range(rows) if not weight[row][unknown[row % count]].any()]
    assert dead_rows(weight, unknown).tolist() == expected


_RESHAPES = [
    (("n", 6), ("3n", 2)),
    (("n", 6), ("n/2", 12)),
    (("2n", 6), ("3n", 4)),
    (("n", 2, 3), ("n", 6)),
    (("n", 6), ("n", 3, 2)),
    ((4, "n", 3), (2, 2, "n", 1, 3)),
    ((2, "n", 3), ("2n", 3)),
    ((2, 6), (3, 4)),
    ((2, "n"), ("2n",)),
]


@given(st.sampled_from(_RESHAPES), st.integers(0, 2**16))
def test_a_reshape_of_facts_against_that_of_values(
    shapes: tuple[tuple[Any, ...], tuple[Any, ...]], seed: int
) -> None:
    symbol = ShapeEnv().create_unbacked_symint()
    have, want = ([_sized(size, 2 * symbol) for size in shape] for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    lengths = [size if isinstance(size, int) else 1 for size in have]
    values = torch.randint(0, 2, lengths, generator=generator).double()
    known = Known(torch.rand(lengths, generator=generator) < 0.8, values)
    result = reshaped(known, have, want)
    for number in (2, 6):
        old, new = ([_sized(size, number) for size in shape] for shape in shapes)
        mask, wanted = (t.expand(old).reshape(new) for t in (known.mask, values))
        claimed = result.mask.expand(new)
        assert not (claimed & ~mask).any()
        assert torch.equal(result.values.expand(new)[claimed], wanted[claimed])
        if not any(isinstance(size, str) for size in shapes[0] + shapes[1]):
            assert torch.equal(claimed, mask)


def _sized(size: int | str, n: Any) -> Any:
    """A size such as 4, n, 2n or n/2."""
    if isinstance(size, int):
        return size
    factor = size.partition("n")[0]
    return n // 2 if size == "n/2" else n * int(factor or 1)


def test_a_chain_is_followed_to_its_end() -> None:
    model = randomize(
        nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.BatchNorm1d(6), nn.Linear(6, 3))
    ).double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0.0
        model[3].weight[2] = torch.tensor([0.0, 3.0, 0.0, 0.0, -2.0, 0.0])
    program = capture(model, (torch.randn(4, 5, dtype=torch.float64),))
    facts = constant_channels(program)
    linear, gelu, norm, last = (facts[node] for node in calls(program))
    for known in (linear, gelu, norm):
        assert known.shape == (1, 6)
        assert known.mask[0].nonzero().flatten().tolist() == [1, 4]
    assert torch.equal(linear.values[0, [1, 4]], model[0].bias[[1, 4]])
    assert last.mask[0].tolist() == [False, False, True]
    c = norm.values[0]
    expected = model[3].bias[2] + 3.0 * c[1] - 2.0 * c[4]
    torch.testing.assert_close(last.values[0, 2], expected.detach(), rtol=1e-14, atol=0)


def _convolved(layer: nn.Module, value: float) -> list[float | None]:
    """What is known behind `layer` of an image whose first channel of two is `value`."""
    layer = randomize(layer).double()
    with torch.no_grad():
        layer.weight[:, 1] = 0.0  # type: ignore[index,operator,union-attr]
        layer.weight[1, 0] = 0.0  # type: ignore[index,operator,union-attr]

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([torch.full_like(x, value), x], 1))

    program = capture(Filled().eval(), (torch.randn(2, 1, 4, 4, dtype=torch.float64),))
    return found(fact_of_output(program))


def test_padding_spoils_a_constant_but_not_a_zero() -> None:
    padded, same = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding="same")
    for layer in (padded, same):
        known = _convolved(layer, 0.7)
        assert known[0] is None
        assert known[1] == layer.bias.detach()[1].item()
        assert None not in _convolved(layer, 0.0)
    assert None not in _convolved(nn.Conv2d(2, 2, 3), 0.7)
    assert None not in _convolved(nn.Conv2d(2, 2, 1, padding="same"), 0.7)


def test_each_group_of_a_convolution_reads_its_own_channels() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False).double()

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([x, torch.full_like(x, 0.5)], 1))

    program = capture(Filled(), (torch.randn(2, 2, 3, 3, dtype=torch.float64),))
    known = found(fact_of_output(program))
    assert known[:2] == [None, None]
    expected = 0.5 * layer.weight.detach()[2:].sum((1, 2, 3))
    assert known[2:] == pytest.approx(expected.tolist(), rel=1e-14)


X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def _beside(x: Tensor, fill: float = 0.5) -> Tensor:
    """x with a constant channel before its three."""
    return torch.cat([torch.full_like(x[:, :1], fill), _of_three(x)], 1)


def _of_three(x: Tensor) -> Tensor:
    """x, the number of whose channels is fixed."""
    return x + torch.zeros(3, 1, 1, dtype=x.dtype)


_KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool, padded": lambda x: functional.max_pool2d(_beside(x), 3, 1, 1),
    "average without the border": lambda x: functional.avg_pool2d(
        _beside(x), 3, 1, 1, count_include_pad=False
    ),
    "average, not padded": lambda x: functional.avg_pool2d(_beside(x), 2),
    "adaptive average": lambda x: functional.adaptive_avg_pool2d(_beside(x), 2),
    "nearest": lambda x: functional.interpolate(_beside(x), scale_factor=2),
    "bilinear": lambda x: functional.interpolate(_beside(x), scale_factor=2, mode="bilinear"),
    "reflection": lambda x: functional.pad(_beside(x), (1, 1, 1, 1), "reflect"),
    "padded with itself": lambda x: functional.pad(_beside(x), (1, 1, 1, 1), value=0.5),
    "mean": lambda x: _beside(x).mean((2, 3)),
    "flip": lambda x: _beside(x).flip(2),
    "flatten": lambda x: _beside(x).flatten(2),
    "split": lambda x: _beside(x).chunk(2, 1)[0],
    "swap": lambda x: _beside(x).transpose(1, 3).transpose(1, 3),
    "merged and split": lambda x: _beside(x + torch.zeros(6, 6)).flatten(1).unflatten(1, (4, 6, 6)),
    "repeat": lambda x: _beside(x).repeat(1, 1, 2, 1),
    "select": lambda x: _beside(x)[:, :, 0],
    "where": lambda x: torch.where(x[:, :1] > 0, _beside(x), 0.5),
    "cast": lambda x: _beside(x).half().double(),
    "prelu": lambda x: functional.prelu(_beside(x), torch.tensor([0.1], dtype=x.dtype)),
    "index": lambda x: _beside(x)[:, torch.tensor([0, 2, 0, 1])],
    "stacked": lambda x: torch.stack([_beside(x)[:, 0], x[:, 0]], 1),
}


@pytest.mark.parametrize("name", _KEPT)
def test_what_keeps_a_constant(name: str) -> None:
    known = fact_of_output(program_of(_KEPT[name], X))
    assert known is not None
    assert bool(known.mask.select(1, 0).all())
    assert known.values.select(1, 0).unique().tolist() == [0.5]


_LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "average with the border": lambda x: functional.avg_pool2d(_beside(x), 3, 1, 1),
    "another divisor": lambda x: functional.avg_pool2d(_beside(x), 2, divisor_override=3),
    "a sum of as many as the input has": lambda x: _beside(x).sum(2),
    "layer norm": lambda x: functional.layer_norm(_beside(x), (4, 6, 6)),
    "chosen by the input": lambda x: torch.where(x[:, :1] > 0, _beside(x), 0.4),
    "dropped": lambda x: _beside(x) / x[:, :1],
    "picked by the input": lambda x: _beside(x)[:, x.argmax(1)[0, 0, :4]],
}


@pytest.mark.parametrize("name", _LOST)
def test_what_loses_a_constant(name: str) -> None:
    known = fact_of_output(program_of(_LOST[name], X))
    assert known is None or not bool(known.mask.select(1, 0).any())


def test_zero_padding_of_a_constant_is_seen_at_the_border() -> None:
    program = program_of(lambda x: functional.pad(_beside(x + torch.zeros(6, 6)), (1, 1, 1, 1)), X)
    known = fact_of_output(program)
    assert known is not None
    assert known.shape == (1, 4, 8, 8)
    assert known.values[0, 0, 0].tolist() == [0.0] * 8
    assert known.values[0, 0, 3].tolist() == [0.0, *[0.5] * 6, 0.0]
    assert known.along(2).along(3).mask.any().item() is False


def test_a_product_with_zero_is_zero() -> None:
    known = fact_of_output(program_of(lambda x: _beside(x, 0.0) * x[:, :1] * 3.0, X))
    assert found(known)[0] == 0.0
    scaled = program_of(lambda x: x * torch.tensor([0.0, 1.0, 2.0], dtype=x.dtype), X[..., :3])
    assert found(fact_of_output(scaled)) == [0.0, None, None]


def _attended(mask: str) -> Known | None:
    """Attention over a value of which the first of four channels is 0.5 and the second 0."""

    def attend(x: Tensor) -> Tensor:
        x = x + torch.zeros(2, dtype=x.dtype)
        value = torch.cat([torch.full_like(x[..., :1], 0.5), torch.zeros_like(x[..., :1]), x], -1)
        if mask == "written":
            return (x @ x.mT).softmax(-1) @ value
        kwargs: dict[str, Any] = {"is_causal": mask == "causal"}
        if mask == "bool":
            kwargs["attn_mask"] = x[..., :1] > 0
        return functional.scaled_dot_product_attention(x, x, value, **kwargs)

    return fact_of_output(program_of(attend, torch.randn(2, 3, 5, 2, dtype=torch.float64)))


@pytest.mark.parametrize("mask", ["none", "causal", "written"])
def test_weights_that_sum_to_one_keep_a_constant(mask: str) -> None:
    assert found(_attended(mask)) == [0.5, 0.0, None, None]


def test_a_masked_attention_keeps_zero_alone() -> None:
    assert found(_attended("bool")) == [None, 0.0, None, None]


def test_products_of_two_activations() -> None:
    def multiply(x: Tensor) -> Tensor:
        x = x + torch.zeros(2, dtype=x.dtype)
        zero, one = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        left = torch.cat([x, zero, one], -1)
        right = torch.cat([zero, zero, x[..., :1], 2.0 * one], -1)[:, None].mT
        return left[:, None] @ right

    x = torch.randn(3, 2, 2, dtype=torch.float64)
    assert found(fact_of_output(program_of(multiply, x))) == [2.0]

    def known_product(x: Tensor) -> Tensor:
        x = x + torch.zeros(4, dtype=x.dtype)
        return torch.full_like(x, 0.5) @ torch.full_like(x, 2.0).mT + 0.0 * x[..., :1]

    fixed = torch.randn(3, 2, 4, dtype=torch.float64)
    assert set(found(fact_of_output(program_of(known_product, fixed)))) == {4.0}


def test_a_norm_with_a_zero_scale_gives_its_bias() -> None:
    for norm, shape in (
        (nn.LayerNorm(4), (3, 4)),
        (nn.BatchNorm1d(4, track_running_stats=False), (3, 4)),
        (nn.GroupNorm(2, 4), (3, 4, 5)),
    ):
        with torch.no_grad():
            norm.weight[1], norm.bias[1] = 0.0, 0.25
        program = capture(norm.double().eval(), (torch.randn(shape, dtype=torch.float64),))
        assert found(fact_of_output(program)) == [None, 0.25, None, None]


def test_a_table_with_a_constant_column() -> None:
    table = nn.Embedding(7, 3).double()
    with torch.no_grad():
        table.weight[:, 1] = -0.5
    program = capture(table, (torch.randint(0, 7, (2, 4)),))
    assert found(fact_of_output(program)) == [None, -0.5, None]


def test_a_weight_computed_from_state_is_a_constant() -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4).double())
            self.register_buffer("mask", torch.tensor([[1.0], [0.0], [1.0]]).double())

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight * self.mask)

    program = capture(Masked(), (torch.randn(2, 4).double(),))
    assert found(fact_of_output(program)) == [None, 0.0, None]


def test_state_that_is_written_is_unknown() -> None:
    class Counted(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            result = x * 0.0 + self.shift
            self.shift.add_(1.0)
            return result

    program = capture(Counted(), (torch.randn(2, 3).double(),))
    facts = constant_channels(program)
    assert [node.name for node in facts] == ["mul"]


def test_nothing_infinite_or_nan_is_a_constant() -> None:
    program = program_of(lambda x: (x * 0.0).log() + 1.0, X)
    assert [node.name for node in constant_channels(program)] == ["mul"]
    program = program_of(lambda x: x + torch.full_like(x, torch.inf), X)
    assert not constant_channels(program)


def test_in_train_mode_parameters_are_what_they_are_now() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[:2] = torch.tensor([0.0, 1.0])
        model[0].weight[1] = 0.0
    program = capture(model.train(), (torch.randn(2, 4).double(),), mode="train")
    facts = {node.name: known for node, known in constant_channels(program).items()}
    assert facts["linear"].mask[0].tolist() == [True, True, False]
    assert facts["relu"].mask[0].tolist() == [True, False, False]


def test_bert_base_takes_well_under_a_second() -> None:
    model = transformers.BertModel(transformers.BertConfig()).eval()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight[::2] = 0.0
    ids = torch.randint(0, 1000, (2, 16))
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        facts = constant_channels(program)
        seconds.append(time.perf_counter() - start)
    hidden = [facts[node] for node in calls(program, aten.gelu.default)]
    assert [int(known.mask.sum()) for known in hidden] == [1536] * 12
    assert min(seconds) < 1.0
