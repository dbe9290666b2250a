"""Int8Embedding: tables and bags in int8 rows, and every table that it must leave alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxopt
from fxopt import EquivalenceError, Int8Embedding, Int8Linear, PassError, Sqnr
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.program import Changes, Program
from fxopt.recipe import materialize
from fxopt.weights import quantize_rows
from tests.captured import captured, case
from tests.check import assert_close_to_model, assert_unchanged, check
from tests.models import Drawn, TiedHead, sequence_models

aten, ops = torch.ops.aten, torch.ops.fxopt

IDS = torch.tensor([[3, 7, 7, 0, 19], [7, 7, 7, 7, 7], [1, 2, 7, 5, 19]])


class Bag(nn.Module):
    """Ids [N] in bags of three, or ids [B, L] in bags of L, with a row for padding that isn't 0."""

    def __init__(self, mode: str = "sum", padding: int | None = None, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 16, mode=mode, padding_idx=padding, **options)
        nn.init.normal_(self.bag.weight)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        offsets = None if ids.ndim == 2 else torch.arange(0, ids.shape[0], 3)
        pooled: Tensor = self.bag(ids, offsets, weights)
        return pooled


class Positions(nn.Module):
    """Two tables, one read twice, and a linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16, **options)
        self.positions = nn.Embedding(12, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = self.words(ids) + self.words(ids.flip(1)).sin() + self.positions(places)
        result: Tensor = self.head(x)
        return result


def returning(program: Program, node: fx.Node) -> Program:
    """The program with the value of `node` for its output."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for one in program.graph.nodes:
        if one.op != "output":
            copies[one] = graph.node_copy(one, copies.__getitem__)
            copies[one].meta = dict(one.meta)
    graph.output((copies[node],))
    return replace(program, graph=graph)


def refusal_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    (refusal,) = check(Int8Embedding(), model, inputs, 0).changes.refused
    return refusal.reason


def targets(program: Program, target: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_become_int8_rows_that_are_kept_once(dtype: torch.dtype) -> None:
    result = check(Int8Embedding(), Positions().to(dtype), (IDS,), {"QuantizeEmbedding": 3})
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in result.state.items()}
    assert stored.pop("words.weight_int8") == (torch.int8, (20, 16))
    assert stored.pop("words.weight_scale") == (torch.float32, (20, 1))
    assert set(stored) == {
        "positions.weight_int8",
        "positions.weight_scale",
        "head.weight",
        "head.bias",
    }


def test_no_more_than_the_rows_of_a_call_are_dequantized() -> None:
    result = check(Int8Embedding(), nn.Embedding(1000, 64), (IDS,), 1)
    (made,) = targets(result, ops.dequantize.default)
    assert made.args[0].target is aten.embedding.default  # type: ignore[union-attr]
    assert made.meta["val"].ndim == 3
    assert not any(
        node.meta["val"].shape[:1] == (1000,)
        for node in result.graph.nodes
        if node.users and node.op == "call_function"
    )


def test_a_table_takes_a_quarter_of_its_memory() -> None:
    before = capture(nn.Embedding(1000, 64), (IDS,))
    after = check(Int8Embedding(), nn.Embedding(1000, 64), (IDS,), 1)
    assert before.parameter_bytes() == 1000 * 64 * 4
    assert after.parameter_bytes() == 1000 * (64 + 4)


def test_the_row_of_padding_stays_exactly_zero() -> None:
    model = nn.Embedding(20, 16, padding_idx=7)
    opt = fxopt.transform(model, "int8-embedding", example_inputs=(IDS,))
    rows = opt(IDS)
    assert torch.equal(rows[IDS == 7], torch.zeros(8, 16))
    assert bool(rows[IDS != 7].any(-1).all())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, 7, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bags_pool_the_rows_that_are_no_padding(
    mode: str, padding: int | None, dtype: torch.dtype
) -> None:
    model = Bag(mode, padding).to(dtype)
    for ids in (IDS, IDS.flatten()):
        result = check(Int8Embedding(), model, (ids,), {"QuantizeEmbedding": 1})
        assert set(result.state) == {"bag.weight_int8", "bag.weight_scale"}
        assert not result.changes.refused


@pytest.mark.parametrize("padding", [None, 7])
def test_bags_weigh_their_rows(padding: int | None) -> None:
    check(Int8Embedding(), Bag("sum", padding), (IDS, torch.rand(IDS.shape)), 1)


def test_bags_whose_last_offset_is_the_end_stay_so() -> None:
    class Ends(Bag):
        def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
            pooled: Tensor = self.bag(ids, torch.arange(0, ids.shape[0] + 1, 3))
            return pooled

    check(Int8Embedding(), Ends("mean", include_last_offset=True), (IDS.flatten(),), 1)


def test_what_concerns_gradients_alone_is_no_obstacle() -> None:
    check(Int8Embedding(), Positions(sparse=True, scale_grad_by_freq=True), (IDS,), 3)
    check(Int8Embedding(), Bag(scale_grad_by_freq=True), (IDS,), 1)


def test_rows_that_max_norm_bounds_are_refused() -> None:
    model = nn.Embedding(20, 16, max_norm=1.0)
    reason = refusal_of(model, (IDS,))
    assert reason == "max_norm bounds its rows at each call, which writes to the table"


def test_a_table_tied_to_a_head_is_left_alone_and_said_so() -> None:
    model = TiedHead(16)
    result = check(Int8Embedding(), model, (IDS,), 0)
    (refusal,) = result.changes.refused
    assert refusal.node.startswith("embedding")
    assert refusal.reason == "its table embedding.weight is tied: linear reads it too"
    assert result.state["embedding.weight"] is model.embedding.weight


def test_a_tied_table_can_be_asked_for_and_the_plan_says_what_it_costs() -> None:
    model, pass_ = TiedHead(16), Int8Embedding(tied=True)
    before = capture(model, (IDS,))
    result = check(pass_, model, (IDS,), 1)
    assert result.state["embedding.weight"] is model.embedding.weight
    assert result.parameter_bytes() - before.parameter_bytes() == 20 * (16 + 4)
    (line,) = pass_.plan(before).details
    assert line.startswith("embedding.weight stays as it is for head (linear")
    assert line.endswith("its int8 copy adds 400 B")
    assert not pass_.plan(capture(Positions(), (IDS,))).details


def test_a_tied_head_in_int8_and_its_embedding_share_one_table() -> None:
    model = TiedHead(16)
    program = capture(model, (IDS,))
    linears = Int8Linear(mode="weight_only", tied=True, where="always")
    program = linears.apply(program, linears.plan(program))
    plan = Int8Embedding().plan(program)
    result = Int8Embedding().apply(program, plan)
    assert not plan.details
    assert set(result.state) == set(program.state) - {"embedding.weight"}
    assert "embedding.weight_int8" in result.state
    assert_close_to_model(linears.claim, model, result.materialized(), (IDS,))


@pytest.mark.parametrize("group", [2, 4, 16])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0], IDS[:, :, None]], ids=lambda t: t.ndim)
@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_groups_of_a_tied_head_are_its_embeddings(group: int, ids: Tensor, mode: Any) -> None:
    torch.manual_seed(0)
    model = TiedHead(16)
    linears = Int8Linear(mode=mode, tied=True, where="always", group=group)
    program = capture(model, (ids,))
    program = replace(linears.apply(program, linears.plan(program)), changes=Changes())
    pass_ = Int8Embedding()
    result = pass_.apply(program, pass_.plan(program))
    assert_unchanged(pass_, result)
    assert set(result.state) == set(program.state) - {"embedding.weight"}
    (lookup,) = (
        node
        for node in result.graph.nodes
        if node.target is ops.dequantize.default and node.args[0].target is aten.embedding.default
    )
    (rows,) = evaluate(returning(result, lookup), (ids,))
    q, scale = quantize_rows(model.embedding.weight.detach(), group=group)
    dense = (q.view(20, -1, group).float() * scale.unsqueeze(-1)).view(20, 16)
    assert torch.equal(rows, dense[ids])
    selected = fxopt.SelectKernels().apply(result, fxopt.SelectKernels().plan(result))
    assert selected.parameter_bytes() == result.parameter_bytes()
    assert_close_to_model(linears.claim, model, selected.materialized(), (ids,))


def test_int8_values_that_are_another_weights_are_not_taken_for_a_table() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.embedding(ids))
            return y

    linears = Int8Linear(mode="weight_only", where="always", group=4)
    program = capture(Two(), (IDS,))
    program = replace(linears.apply(program, linears.plan(program)), changes=Changes())
    result = Int8Embedding().apply(program, Int8Embedding().plan(program))
    assert {"embedding.weight_int8", "embedding.weight_scale", "head.weight_int8"} < set(
        result.state
    )


def test_a_computed_table_is_computed_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(20, 16)), nn.Parameter(torch.rand(16))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.weight * self.gain)

    result = check(Int8Embedding(), Scaled(), (IDS,), 1)
    assert sorted(t.dtype.itemsize for t in result.state.values()) == [1, 4]


def test_a_table_that_inputs_have_a_part_in_is_refused() -> None:
    class Given(nn.Module):
        def forward(self, ids: Tensor, table: Tensor) -> Tensor:
            return nn.functional.embedding(ids, table * 2)

    reason = refusal_of(Given(), (IDS, torch.randn(20, 16)))
    assert reason.startswith("its table mul")
    assert reason.endswith("isn't the same in every call")


def test_tables_that_would_not_shrink_are_refused() -> None:
    assert "its rows of 1 numbers take no less memory" in refusal_of(nn.Embedding(20, 1), (IDS,))
    half = nn.Embedding(20, 4).bfloat16()
    assert "its rows of 4 numbers take no less memory" in refusal_of(half, (IDS,))
    check(Int8Embedding(), nn.Embedding(20, 2), (IDS,), 1)


def test_integer_tables_are_refused() -> None:
    class Codes(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randint(-9, 9, (20, 16)))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.table)

    assert refusal_of(Codes(), (IDS,)) == "its table is torch.int64, not floating point"


def test_include_and_exclude_are_globs_over_module_paths() -> None:
    result = check(Int8Embedding(include="pos*"), Positions(), (IDS,), 1)  # type: ignore[arg-type]
    assert {refusal.reason for refusal in result.changes.refused} == {"not in include=('pos*',)"}
    result = check(Int8Embedding(exclude="words"), Positions(), (IDS,), 1)  # type: ignore[arg-type]
    assert {refusal.reason for refusal in result.changes.refused} == {"in exclude=('words',)"}
    with pytest.raises(PassError, match=r"Int8Embedding\(include=\(3,\)\): give globs over module"):
        Int8Embedding(include=(3,))  # type: ignore[arg-type]


def test_a_table_that_trains_is_refused_and_a_frozen_one_is_not() -> None:
    model = Positions()
    model.positions.requires_grad_(False)
    opt = fxopt.transform(model, "int8-embedding", example_inputs=(IDS,), mode="train")
    step = opt.report.steps[1]
    assert step.fired == {"QuantizeEmbedding": 1}
    assert {refusal.reason for refusal in step.refused} == {
        "it trains, and rounding to int8 has no gradient"
    }
    opt(IDS).sum().backward()


def test_a_table_of_infinity_is_an_error_that_names_it() -> None:
    class Overflowing(Positions):
        def forward(self, ids: Tensor) -> Tensor:
            rows = nn.functional.embedding(ids, self.words.weight / 0.0)
            return rows.clamp(-1.0, 1.0)

    program = capture(Overflowing(), (IDS,))
    pass_ = Int8Embedding()
    with pytest.raises(PassError) as caught:
        pass_.apply(program, pass_.plan(program))
    text = str(caught.value)
    assert text.startswith("embedding: its table ")
    assert text.endswith(
        "holds NaN or infinity, which integers can't express; exclude= takes it out"
    )


def test_an_empty_batch_goes_through() -> None:
    opt = fxopt.transform(Positions(), "int8-embedding", example_inputs=(IDS,))
    assert opt(IDS[:0]).shape == (0, 5, 4)


@pytest.mark.parametrize("model", [Positions(), Bag("mean", 7)], ids=["embedding", "bag"])
def test_it_is_compiled_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    ids = IDS if isinstance(model, Positions) else IDS.flatten()
    opt = fxopt.transform(model.eval(), "int8-embedding, lower", example_inputs=(ids,))
    other = ids.flip(0)[: len(ids) - 1]
    with torch.no_grad():
        measured = Sqnr(30.0).measure(model(other), opt(other))
    assert measured.holds, measured.text
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(other), opt(other))
    assert {t.dtype for t in loaded.program.state.values()} >= {torch.int8}


def test_onnx_gathers_int8_rows_and_dequantizes_those(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    opt = fxopt.transform(nn.Embedding(20, 16), "int8-embedding", example_inputs=(IDS,))
    path = fxopt.to_onnx(opt, tmp_path / "embedding.onnx")
    graph = onnx.load(str(path)).graph
    assert [node.op_type for node in graph.node] == ["Gather", "Gather", "Cast", "Mul"]
    (table,) = [one for one in graph.initializer if list(one.dims) == [20, 16]]
    assert table.data_type == onnx.TensorProto.INT8
    session = runtime.InferenceSession(str(path))
    (rows,) = session.run(None, {session.get_inputs()[0].name: IDS[:2].numpy()})
    assert torch.equal(torch.from_numpy(rows), opt(IDS[:2]))


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma", "t5-encoder", "clip-text", "electra"])
def test_the_architectures_keep_the_claim(name: str) -> None:
    shared = case(name)
    pass_ = Int8Embedding(tied=True)
    program = captured(name)
    result = pass_.apply(program, pass_.plan(program)).materialized()
    assert result.changes.fired["QuantizeEmbedding"]
    for call in (shared.example, *shared.others):
        assert_close_to_model(pass_.claim, shared.model, result, call)


@settings(max_examples=15)
@given(sequence_models())
def test_drawn_models_keep_the_claim(drawn: Drawn) -> None:
    pass_ = Int8Embedding(tied=True)
    program = capture(drawn.model, drawn.example)
    plan = pass_.plan(program)
    result = pass_.apply(program, plan).materialized()
    assert result.changes.fired.get("QuantizeEmbedding", 0) == ("ids" in drawn.example)
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(pass_.claim, drawn.model, result, call)


class Shifted(Int8Embedding):
    """The pass with a fault in it: every row gets the scale of the next."""

    def apply(self, program: Program, plan: fxopt.Plan) -> Program:
        result = super().apply(program, plan)
        state = {name: materialize(tensor) for name, tensor in result.state.items()}
        moved = {name: state[name].roll(1, 0) for name in state if name.endswith("_scale")}
        return replace(result, state={**state, **moved})


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_a_fault_is_caught(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Embedding(20, 16)
    with torch.no_grad():
        model.weight *= torch.logspace(-1, 1, 20)[:, None]
    with pytest.raises(EquivalenceError, match="broke its claim"):
        fxopt.transform(model, [Shifted()], example_inputs=(IDS,))
