"""Importance: each measure against its definition, and selections that meet what was asked."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from fxopt.analyses.arithmetic import CutCosts
from fxopt.analyses.channels import Group, channels
from fxopt.analyses.importance import KINDS, importance, normalized, ratio_for, select
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import CalibrationError, PassError
from fxopt.program import Program
from tests.architectures import ARCHITECTURES, randomize

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """One hidden layer; its channel 0 does nothing, channel 1 is large."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 4, bias=bias)
        with torch.no_grad():
            self.up.weight[0] = self.up.bias[0] = self.down.weight[:, 0] = 0.0
            self.up.weight[1] *= 9.0
            self.down.weight[:, 1] *= 9.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def calibrated(model: nn.Module, batches: Sequence[Any]) -> Program:
    program = capture(model, batches[0])
    return replace(program, calibration=Calibration(batches, program.signature))


def net(bias: bool = True) -> tuple[Program, Group, nn.Module]:
    model = Net(bias).double().eval()
    program = calibrated(model, [(X[:10].double(),), (X[10:].double(),)])
    (group,) = channels(program).cuttable
    return program, group, model


@functools.cache
def architecture(name: str) -> tuple[Program, tuple[Group, ...]]:
    case = ARCHITECTURES[name]()
    program = calibrated(case.model, [case.example, *case.others])
    kinds = ("ffn", "heads", "channels")
    groups = tuple(one for one in channels(program).cuttable if one.kind in kinds)
    return program, groups


def test_magnitudes_are_norms_of_rows_and_columns() -> None:
    program, group, model = net()
    rows, columns = model.up.weight.detach(), model.down.weight.detach()
    for kind, expected in {
        "l1": rows.abs().sum(1),
        "l2": rows.norm(dim=1),
        "group_l2": (rows.square().sum(1) + columns.square().sum(0)).sqrt(),
    }.items():
        score = importance(program, (group,), kind)[group.name]
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, expected)


def test_activation_is_weight_times_norm_of_input() -> None:
    program, group, model = net()
    with torch.no_grad():
        hidden = torch.relu(model.up(X.double()))
    expected = model.down.weight.detach().abs().sum(0) * hidden.norm(dim=0)
    torch.testing.assert_close(importance(program, (group,), "activation")[group.name], expected)


class WithLoss(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"loss": y.square().mean(), "logits": y}


def test_taylor_is_that_of_the_models_own_loss() -> None:
    model = WithLoss().double().eval()
    batches = [(X[:10].double(),), (X[10:].double(),)]
    program = calibrated(model, batches)
    (group,) = (one for one in channels(program).cuttable if one.size == 5)
    expected = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        model.zero_grad()
        model(*batch)["loss"].backward()
        change = (model.up.weight.grad * model.up.weight).sum(1)
        change += model.up.bias.grad * model.up.bias
        change += (model.down.weight.grad * model.down.weight).sum(0)
        expected += change.detach().square()
    model.zero_grad()
    for seed in (0, 1):
        score = importance(program, (group,), "taylor", seed)[group.name]
        torch.testing.assert_close(score, expected)
    assert all(one.grad is None for one in model.parameters())
    assert all(one.requires_grad for one in model.parameters())


def test_taylor_without_a_loss_is_the_energy_of_the_outputs_change() -> None:
    program, group, model = net()
    names = ("up.weight", "up.bias", "down.weight")
    expected = torch.zeros(5, dtype=torch.float64)
    for (batch,) in program.batches():
        for channel in range(5):
            part = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
            part["up.weight"][channel] = model.up.weight.detach()[channel]
            part["up.bias"][channel] = model.up.bias.detach()[channel]
            part["down.weight"][:, channel] = model.down.weight.detach()[:, channel]
            full = {name: one.detach() for name, one in model.named_parameters()}

            def forward(part: Any, full: Any = full, batch: Tensor = batch) -> Tensor:
                return torch.func.functional_call(model, {**full, **part}, (batch,))

            primal = {name: full[name] for name in names}
            _, change = torch.func.jvp(forward, (primal,), (part,))
            expected[channel] += change.square().sum()
    draws = [importance(program, (group,), "taylor", seed)[group.name] for seed in range(400)]
    mean = torch.stack(draws).mean(0)
    assert float(mean[0]) == 0.0
    torch.testing.assert_close(mean[1:], expected[1:], rtol=0.2, atol=0.0)


@pytest.mark.parametrize("bias", [True, False])
def test_obs_lets_the_cheapest_leave_first(bias: bool) -> None:
    program, group, model = net(bias)
    score = importance(program, (group,), "obs")[group.name]
    with torch.no_grad():
        hidden = torch.relu(model.up(X.double()))
        y = model.down(hidden)
    if bias:
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)

    def error(left: Sequence[int]) -> float:
        columns = hidden[:, [*left, *range(5, hidden.shape[1])]]
        if not columns.shape[1]:
            return float(y.square().sum())
        fit = torch.linalg.lstsq(columns, y, driver="gelsd").solution
        return float((y - columns @ fit).square().sum())

    left, spent = list(range(5)), 0.0
    for channel in score.argsort().tolist():
        costs = {one: error([other for other in left if other != one]) - spent for one in left}
        assert min(costs, key=costs.__getitem__) == channel or costs[channel] < 1e-3
        left.remove(channel)
        spent += costs[channel]
        if spent > 1e-3:
            assert float(score[channel]) >= 0.99 * costs[channel]
    assert bool((score.sort().values.diff() > 0).all()), "the order can't be told"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "cnn"])
def test_every_kind_ranks_every_group(name: str, kind: Any) -> None:
    program, groups = architecture(name)
    assert groups
    scores = importance(program, groups, kind)
    assert list(scores) == [group.name for group in groups]
    again = importance(program, groups, kind)
    for group in groups:
        score = scores[group.name]
        assert score.dtype == torch.float64
        assert score.shape == (group.size,)
        assert bool((score >= 0).all())
        assert len(score.unique()) == group.size
        assert torch.equal(score, again[group.name])


def test_experts_are_ranked_and_can_not_be_refitted() -> None:
    program, groups = architecture("mixtral")
    experts = [one for one in groups if "experts" in one.name]
    assert experts
    for kind in ("l2", "taylor", "activation"):
        scores = importance(program, experts, kind)
        assert all(len(score.unique()) > 1 for score in scores.values())
    with pytest.raises(PassError, match=r"can't be refitted: transformers.*; use 'activation'"):
        importance(program, experts, "obs")


@pytest.mark.parametrize("kind", ["l1", "l2", "group_l2", "taylor", "activation", "obs"])
def test_a_dead_head_comes_last(kind: Any) -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        vocab_size=29,
    )
    model = randomize(BertForSequenceClassification(config))
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        for one in (attention.self.query, attention.self.key, attention.self.value):
            one.weight[8:12] = one.bias[8:12] = 0.0
        attention.output.dense.weight[:, 8:12] = 0.0
    ids = torch.randint(29, (8, 7), generator=torch.Generator().manual_seed(0))
    program = calibrated(model, [{"input_ids": ids}])
    (heads,) = (one for one in channels(program).cuttable if one.kind == "heads")
    score = importance(program, (heads,), kind)[heads.name]
    assert int(score.argmin()) == 2
    assert float(score[2]) < 1e-3 * float(score.max())


def test_nan_is_refused_by_name() -> None:
    for kind in ("l1", "l2", "group_l2", "taylor", "activation", "obs"):
        program, group, model = net()
        with torch.no_grad():
            model.down.weight[2, 3] = model.up.weight[3, 1] = torch.nan
        with pytest.raises((PassError, CalibrationError), match="NaN") as caught:
            importance(program, (group,), kind)
        assert "up" in str(caught.value) or "relu" in str(caught.value)
    program, group, model = net()
    with torch.no_grad():
        model.down.weight[2, 3] = torch.inf
    for kind in ("group_l2", "activation", "obs"):
        with pytest.raises(PassError, match=r"down\.weight gives NaN or infinity at channel 3"):
            importance(program, (group,), kind)


def test_what_cannot_be_measured_says_what_to_use() -> None:
    program, group, _ = net()
    with pytest.raises(PassError, match=r"kind='l3'\): give one of l1, l2, group_l2, taylor, acti"):
        importance(program, (group,), "l3")  # type: ignore[arg-type]
    made_by_none = replace(group, places=group.places[-1:])
    with pytest.raises(
        PassError, match=r"ffn are made by no floating-point parameter, so they can"
    ):
        importance(program, (made_by_none,), "l1")
    unread = replace(group, readers=())
    for kind in ("activation", "obs"):
        with pytest.raises(PassError, match=r"nothing reads the channels of .*ffn with a weight"):
            importance(program, (unread,), kind)  # type: ignore[arg-type]
    with torch.no_grad():
        frozen = capture(nn.Sequential(nn.Embedding(5, 4)), (torch.tensor([1, 2]),))
    other = replace(group, places=tuple(p for p in group.places if "up" in p.name))
    with pytest.raises((PassError, KeyError)):
        importance(frozen, (other,), "taylor")


def test_normalized_scores_have_their_groups_own_unit() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2), "c": torch.tensor([5.0])}
    for how, first in {
        "mean": [0.5, 1, 1.5],
        "max": [1 / 3, 2 / 3, 1],
        "sum": [1 / 6, 1 / 3, 0.5],
    }.items():
        found = normalized(scores, how)  # type: ignore[arg-type]
        torch.testing.assert_close(found["a"], torch.tensor(first))
        assert found["b"].tolist() == [0.0, 0.0]
        assert found["c"].tolist() == [1.0]
    assert torch.equal(normalized(scores, "none")["a"], scores["a"])
    with pytest.raises(PassError, match=r"how='std'\): give one of mean, max, sum, none"):
        normalized(scores, "std")  # type: ignore[arg-type]


@given(
    st.sampled_from(["bert", "llama", "gpt2", "cnn"]),
    st.floats(0.0, 1.0),
    st.sampled_from(["local", "global"]),
    st.sampled_from([1, 2, 8, 24]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_what_is_kept_are_the_best_in_the_number_asked_for(
    name: str, ratio: float, ranking: Any, round_to: int, least: int, seed: int
) -> None:
    _, groups = architecture(name)
    draw = torch.Generator().manual_seed(seed)
    scores = {one.name: torch.rand(one.size, generator=draw).round(decimals=1) for one in groups}
    options: Any = {"ranking": ranking, "round_to": round_to, "least": least}
    kept = select(groups, scores, ratio=ratio, **options)
    more = select(groups, scores, ratio=ratio / 2, **options)
    for group in groups:
        indices = kept[group.name]
        assert indices.dtype == torch.int64
        assert torch.equal(indices, indices.unique())
        assert min(least, group.size) <= len(indices) <= group.size
        widths = {place.positions.shape[1] for place in group.places}
        assert len(indices) == group.size or all(
            len(indices) * width % round_to == 0 for width in widths
        )
        out = torch.ones(group.size, dtype=torch.bool)
        out[indices] = False
        score = scores[group.name]
        if bool(out.any()):
            assert float(score[out].max()) <= float(score[indices].min())
        assert set(indices.tolist()) <= set(more[group.name].tolist()), "a larger ratio keeps more"
        if ranking == "local":
            wanted = max(least, math.ceil((1 - ratio) * group.size - 1e-9))
            step = max(math.lcm(round_to, width) // width for width in widths)
            assert wanted <= len(indices) or len(indices) == group.size
            assert len(indices) < wanted + step


def test_a_global_threshold_removes_the_share_of_parameters() -> None:
    program, groups = architecture("bert")
    costs = CutCosts(program)
    sizes = {one.name: costs.after({one.name: torch.arange(one.size - 1)}) for one in groups}
    dense = costs.after({}).parameters
    per_channel = {name: dense - cost.parameters for name, cost in sizes.items()}
    total = sum(per_channel[one.name] * one.size for one in groups)
    draw = torch.Generator().manual_seed(0)
    scores = {one.name: torch.rand(one.size, generator=draw) for one in groups}
    for ratio in (0.0, 0.25, 0.5):
        kept = select(groups, scores, ratio=ratio, ranking="global")
        gone = {one.name: one.size - len(kept[one.name]) for one in groups}
        removed = sum(per_channel[name] * count for name, count in gone.items())
        assert ratio * total - max(per_channel.values()) <= removed <= ratio * total + 1e-6
        lowest_kept = min(float(scores[name][index].min()) for name, index in kept.items())
        for one in groups:
            out = torch.ones(one.size, dtype=torch.bool)
            out[kept[one.name]] = False
            assert not bool(out.any()) or float(scores[one.name][out].max()) <= lowest_kept


def test_the_first_of_equal_scores_stay_and_refused_groups_keep_all() -> None:
    program, group, _ = net()
    refused = next(one for one in channels(program).groups if one.refusals)
    scores = {group.name: torch.ones(5), refused.name: torch.zeros(refused.size)}
    for ranking in ("local", "global"):
        kept = select((refused, group), scores, ratio=0.5, ranking=ranking)  # type: ignore[arg-type]
        assert kept[group.name].tolist() == [0, 1, 2]
        assert kept[refused.name].tolist() == list(range(refused.size))
    assert select((group,), scores, ratio=0.2)[group.name].tolist() == [0, 1, 2, 3]


@given(
    st.sampled_from(["bert", "llama", "cnn"]),
    st.sampled_from(["target_flops", "target_params"]),
    st.floats(0.05, 0.99),
    st.sampled_from(["local", "global"]),
    st.sampled_from([1, 8]),
)
def test_the_ratio_for_a_target_is_the_smallest_that_meets_it(
    name: str, which: str, target: float, ranking: Any, round_to: int
) -> None:
    program, groups = architecture(name)
    scores = normalized(importance(program, groups, "l2"))
    options: Any = {"ranking": ranking, "round_to": round_to}
    costs = CutCosts(program)

    def share(ratio: float) -> float:
        cost = costs.after(select(groups, scores, ratio=ratio, **options))
        dense = costs.after({})
        if which == "target_flops":
            return cost.flops / dense.flops
        return cost.parameters / dense.parameters

    if share(1.0) > target:
        text = f"leaves {share(1.0):.3f} of the dense program; give a larger target"
        with pytest.raises(PassError, match=re.escape(text)):
            ratio_for(program, groups, scores, **{which: target}, **options)
        return
    ratio = ratio_for(program, groups, scores, **{which: target}, **options)
    assert share(ratio) <= target
    assert share(max(0.0, ratio - 1e-6)) > target


def test_wrong_options_say_what_to_give() -> None:
    program, group, _ = net()
    scores = {group.name: torch.rand(5)}
    with pytest.raises(PassError, match=r"ratio=1.5\): give the share to remove, from 0 to 1"):
        select((group,), scores, ratio=1.5)
    with pytest.raises(PassError, match=r"round_to=0\): give 1 or more"):
        select((group,), scores, ratio=0.5, round_to=0)
    with pytest.raises(PassError, match=r"least=0\): give 1 or more"):
        select((group,), scores, ratio=0.5, least=0)
    with pytest.raises(PassError, match=r"ranking='both'\): give one of \('local', 'global'\)"):
        select((group,), scores, ratio=0.5, ranking="both")  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"ffn has 5 channels, but its score is none; give what"):
        select((group,), {}, ratio=0.5)
    with pytest.raises(PassError, match=r"its score is a tensor of \(4,\)"):
        select((group,), {group.name: torch.rand(4)}, ratio=0.5)
    for wrong in ({}, {"target_flops": 1.5}, {"target_flops": 0.5, "target_params": 0.5}):
        with pytest.raises(PassError, match=r"give one of them, as the share of the dense program"):
            ratio_for(program, (group,), scores, **wrong)
    with pytest.raises(
        PassError, match=r"target_params=0.01 can't be reached: the largest cut of "
    ):
        ratio_for(program, (group,), scores, target_params=0.01)
