"""FoldPruned on drawn models with dead channels: the masked original, and nothing left over."""

from __future__ import annotations

import cProfile
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers import BertConfig, BertModel

import fxopt
from fxopt import wellformed
from fxopt.analyses.channels import Channels, Group, channels
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.nodes import arguments
from fxopt.passes.pruning.fold_pruned import FoldPruned
from fxopt.program import Program
from tests.architectures import randomize
from tests.check import assert_unchanged, tensors_of
from tests.models import Drawn
from tests.pruned_blocks import Mlp, Stem, TiedTranspose, TwiceRead
from tests.pruned_models import Kill, kill, kills, masked, prunable_models
from tests.pruning_oracles import is_needed, relative_change
from tests.sweeps import in_parts

aten = torch.ops.aten

_FEW = in_parts(50)
_MANY = in_parts(500, one_in=5)
_DOUBLES = st.just(torch.float64)
_RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
_MODELS = st.integers(0, 3).flatmap(
    lambda quarter: masked(prunable_models()) if quarter == 3 else prunable_models()
)


def _mutated(drawn: Drawn, mutations: st.DataObject) -> Program:
    """The program of a model some of whose channels have just been made needless."""
    program = capture(drawn.model, drawn.example)
    groups = channels(program).groups
    kill(program, {g.name: g for g in groups}, mutations.draw(kills(groups), label="kills"))
    return program


def _assert_equals_masked_original(drawn: Drawn, data: st.DataObject) -> None:
    program = _mutated(drawn, data)
    fold = FoldPruned()
    result = fold.apply(program, fold.plan(program)).materialized()
    wellformed.check(result)
    assert_unchanged(fold, result)
    for call in (drawn.example, *drawn.others):
        with torch.no_grad():
            reference = tensors_of(drawn.model(**call))
        outputs = evaluate(result, result.signature.flatten((), call))
        outputs = tensors_of(result.signature.unflatten(outputs))
        assert [one.shape for one in outputs] == [one.shape for one in reference]
        change = relative_change(reference, outputs)
        dtype = next(drawn.model.parameters()).dtype
        assert change <= _RELATIVE[dtype], f"relative error {change:.1e} in {dtype}"


def _assert_nothing_left(drawn: Drawn, data: st.DataObject) -> None:
    """Every channel of every group that could be cut is needed."""
    program = _mutated(drawn, data)
    fold = FoldPruned()
    plan = fold.plan(program)
    # One channel of a dead group stays, and with it all that it reads.
    assume(not any(len(kept) == 1 for kept in plan.keep.values()))
    assume(not re.search(r"\b(\d+) of \1 channels", str(plan)))
    result = fold.apply(program, plan).materialized()
    found = channels(result)
    for group in found.cuttable:
        exempt = _reads_itself(group) or _is_normed_in_groups(result, found, group)
        if exempt or _is_masked(result, found, group) or _is_flattened(group):
            continue
        some = data.draw(st.sets(st.integers(0, group.size - 1), min_size=1, max_size=6))
        for channel in some:
            assert is_needed(result, group, channel), f"channel {channel} of {group}; {plan}"


def _reads_itself(group: Group) -> bool:
    """x + W x: which channels of x are dead depends on which of them are."""
    produced = {place.name for place in group.producers}
    return any(reader.weight and reader.weight.name in produced for reader in group.readers)


def _is_normed_in_groups(program: Program, found: Channels, group: Group) -> bool:
    """A constant isn't followed through a group norm, though one over constants alone is one."""
    norms = _calls(program, aten.group_norm.default)
    return any(_stands_in(found, group, node, (1,)) for node in norms)


def _is_masked(program: Program, found: Channels, group: Group) -> bool:
    """A constant value comes out of masked attention as it went in, but for rows of -inf alone."""
    attentions = _calls(program, aten.scaled_dot_product_attention.default)
    masked_ones = [node for node in attentions if arguments(node)["attn_mask"] is not None]
    return any(_stands_in(found, group, node, (1, 3)) for node in masked_ones)


def _is_flattened(group: Group) -> bool:
    """A constant isn't followed where a run-time number of positions joins its axis."""
    targets = [reader.operand.node.target for reader in group.readers]
    return aten.flatten.using_ints in targets


def _calls(program: Program, target: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _stands_in(found: Channels, group: Group, node: fx.Node, axes: Sequence[int]) -> bool:
    dims, leaf = found.walk.dims, found.walk.dims.find(group.dim)
    return any(leaf in dims.leaves(found.walk.of(node)[axis]) for axis in axes)


@_FEW
@given(_MODELS, st.data())
def test_outputs_equal_those_of_the_masked_original(drawn: Drawn, data: st.DataObject) -> None:
    _assert_equals_masked_original(drawn, data)


@_FEW
@given(prunable_models(dtypes=_DOUBLES), st.data())
def test_every_channel_that_stays_is_needed(drawn: Drawn, data: st.DataObject) -> None:
    _assert_nothing_left(drawn, data)


@pytest.mark.slow
@_MANY
@given(_MODELS, st.data())
def test_outputs_equal_those_of_many_masked_originals(drawn: Drawn, data: st.DataObject) -> None:
    _assert_equals_masked_original(drawn, data)


@pytest.mark.slow
@_MANY
@given(prunable_models(dtypes=_DOUBLES), st.data())
def test_every_channel_that_stays_in_many_models_is_needed(
    drawn: Drawn, data: st.DataObject
) -> None:
    _assert_nothing_left(drawn, data)


def test_needless_are_dead_channels_alone_and_none_that_a_relu_switches_off_by_chance() -> None:
    model = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 2)).double()
    randomize(model)
    nn.init.zeros_(model[0].weight[:2])  # zero, and constant
    nn.init.zeros_(model[0].bias[:1])
    nn.init.zeros_(model[2].weight[:, 2])  # unread
    small = torch.linspace(-0.01, 0.01, 12, dtype=torch.float64)  # the bias decides the sign
    program = capture(model, {"input": small.reshape(2, 6)})
    (group,) = channels(program).cuttable
    needless = [channel for channel in range(300) if not is_needed(program, group, channel)]
    assert needless == [0, 1, 2]


def _killed(model: nn.Module, mutations: Sequence[Kill]) -> nn.Module:
    program = capture(model, {"x": torch.randn(2, 3, 6, dtype=torch.float64)})
    kill(program, {group.name: group for group in channels(program).groups}, mutations)
    return model


def _assert_folds(model: nn.Module) -> Program:
    program = capture(model, {"x": torch.randn(2, 3, 6, dtype=torch.float64)})
    fold = FoldPruned()
    result = fold.apply(program, fold.plan(program)).materialized()
    outputs = evaluate(result, program.example)
    assert relative_change([model(*program.example)], outputs) < 1e-12
    return result


def test_a_constant_moves_through_the_activation_into_the_next_bias() -> None:
    model = Stem(6, Mlp(8, 12, "gelu", (True, True), nn.Identity()), 8)
    model = _killed(randomize(model).double(), [Kill("body.up.ffn", (2, 5), "constant")])
    result = _assert_folds(model)
    assert tuple(result.state["body.up.weight"].shape) == (10, 8)


def test_constants_of_two_layers_in_a_row_are_cut_from_their_own_groups() -> None:
    model = randomize(Stem(6, TwiceRead(8, 6, "silu"), 8)).double()
    mutations = [Kill("stem.ffn", (0,), "constant"), Kill("body.ffn", (1,), "constant")]
    model = _killed(model, mutations)
    _assert_folds(model)


def test_a_new_bias_is_not_taken_for_that_of_the_layer_which_shares_its_weight() -> None:
    body = nn.Sequential(TiedTranspose(8, 4, "tanh"), nn.LayerNorm(8))
    model = randomize(Stem(6, body, 8)).double()
    nn.init.zeros_(model.stem.weight)
    _assert_folds(model)


def test_a_constant_that_a_norm_sees_is_refused() -> None:
    model = Stem(6, nn.LayerNorm(8), 8)
    model = _killed(randomize(model).double(), [Kill("stem.residual", (1,), "constant")])
    program = capture(model, {"x": torch.randn(2, 3, 6, dtype=torch.float64)})
    plan = FoldPruned().plan(program)
    assert not plan.keep
    assert "1 of 8 channels are constant, but a norm takes its statistics over it" in str(plan)


class Masked(nn.Module):
    """Two heads under a mask, of which the first gives its value's bias to every query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        nn.init.zeros_(self.v.weight[:4])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_constant_heads_under_a_mask_are_refused_and_one_empty_row_tells_why() -> None:
    model = Masked()
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    plan = FoldPruned().plan(capture(model.eval(), {"x": x, "mask": mask}))
    assert not plan.keep
    assert (
        "1 of 2 channels are constant, but attention gives 0 in their place to a query whose keys "
        "are all masked"
    ) in str(plan)
    mask[0, 0, 3] = False
    model.out.weight[:, 4:] = 0.0
    rows = model(x, mask)[0]
    torch.testing.assert_close(rows[3], model.out.bias)
    assert not torch.allclose(rows[2], rows[3])


class Causal(Masked):
    """The same under a mask that leaves each query itself, as booleans or as what is added."""

    mask: Tensor

    def __init__(self, added: bool) -> None:
        super().__init__()
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        mask = torch.zeros(5, 5).masked_fill(~seen, -torch.inf) if added else seen
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.mask)


@pytest.mark.parametrize("added", [False, True])
def test_constant_heads_leave_where_each_query_is_known_to_see_a_key(added: bool) -> None:
    model, x = Causal(added).eval(), torch.randn(2, 5, 8)
    opt = fxopt.transform(model, "fold-pruned", example_inputs=(x,))
    assert tuple(opt.state_dict()["v.weight"].shape) == (4, 8)
    torch.testing.assert_close(opt(x), model(x))


@torch.no_grad()
def test_constants_that_a_flattening_hides_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(100, 5)).eval()
    model[0].weight[2:] = 0.0
    plan = FoldPruned().plan(capture(model, {"input": torch.randn(2, 3, 5, 5)}))
    assert not plan.keep
    assert "2 of 4 channels are constant, but they aren't followed where other axes" in str(plan)


@torch.no_grad()
def test_constants_that_a_group_norm_sees_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 1)).eval()
    model[0].weight[2:] = 0.0
    plan = FoldPruned().plan(capture(model, {"input": torch.randn(2, 3, 5, 5)}))
    assert not plan.keep
    assert "are constant, but a" in str(plan)


def _calls_to_fold(layers: int) -> int:
    """How many functions FoldPruned calls on a BERT whose feed-forward nets are half constant."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=layers, vocab_size=16)
    model = BertModel(config, add_pooling_layer=False).eval()
    for layer in model.encoder.layer:
        nn.init.zeros_(layer.intermediate.dense.weight[:8].detach())
    program = capture(model, {"input_ids": torch.arange(16).view(2, 8)})
    fold = FoldPruned()
    with cProfile.Profile() as profile:
        plan = fold.plan(program)
        fold.apply(program, plan)
    assert len(plan.sites) == layers
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_is_linear_in_the_layers() -> None:
    two, eight, fourteen = (_calls_to_fold(layers) for layers in (2, 8, 14))
    assert fourteen - eight <= 1.1 * (eight - two)
