"""Autocast: what is low and what stays high, where casts are, how true it is, how it trains."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxopt
from fxopt import Autocast, Canonicalize, Close, Exact, PassError, Sqnr, wellformed
from fxopt.analyses.precision import autocast_casts, cheapest_placement, graph_casts
from fxopt.analyses.precision.cast_placement import priced
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.interpreter import evaluate
from fxopt.passes.mixed_precision.autocast import AutocastPlan
from fxopt.passes.mixed_precision.autocast_planning import cast_graph, sides_of
from fxopt.program import Program
from tests.captured import canonicalized, captured, case
from tests.check import check, tensors_of
from tests.models import Attention, Drawn, GatedMlp, Residual, conv_models, sequence_models
from tests.sweeps import in_parts

aten = torch.ops.aten
PASS = Autocast(dtype=torch.bfloat16, force=True)
_FLOATS = st.just(torch.float32)
_OPERATORS = ("aten.linear", "aten.gelu", "aten.add.Tensor", "aten.layer_norm", "body.*", "*")
POLICIES = st.dictionaries(
    st.sampled_from(_OPERATORS), st.sampled_from(["low", "high", "either"]), max_size=3
)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def planned(pass_: Autocast, program: Program) -> AutocastPlan:
    plan = pass_.plan(program)
    assert isinstance(plan, AutocastPlan)
    return plan


def applied(pass_: Autocast, model: nn.Module, inputs: Any, **options: Any) -> Program:
    program = capture(model, inputs, **options)
    return pass_.apply(program, pass_.plan(program))


def halves(program: Program) -> list[fx.Node]:
    """The operations whose result is in half precision."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].dtype in (torch.bfloat16, torch.float16)
    ]


def names(nodes: list[fx.Node]) -> Counter[str]:
    return Counter(str(node.target) for node in nodes)


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make()  # type: ignore[no-any-return]


# What is where


def test_products_and_what_lies_between_them_are_low() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    program = check(PASS, model, (x_of(4, 8),), {"ComputeInHalf": 3})

    assert names(halves(program))["aten.gelu.default"] == 1
    assert graph_casts(program).count == 2


def test_a_table_that_no_product_reads_is_not_rounded() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.norm(self.words(ids)))

    program = applied(PASS, seeded(Embeds), (torch.arange(6).reshape(2, 3),))
    assert program.state["words.weight"].dtype == torch.float32


def test_norms_and_softmax_stay_high() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1)))
    program = applied(PASS, model, (x_of(4, 8),))

    assert set(names(halves(program))) == {"aten.linear.default", "aten.to.dtype"}


def test_a_residual_sum_stays_high_and_widens_its_low_operand() -> None:
    block = seeded(lambda: nn.Sequential(Residual(nn.Linear(8, 8)), nn.LayerNorm(8)))
    program = applied(PASS, block, (x_of(4, 8),))
    (add,) = [node for node in program.graph.nodes if node.target is aten.add.Tensor]

    assert add.meta["val"].dtype == torch.float32
    assert torch.bfloat16 in [one.meta["val"].dtype for one in add.all_input_nodes]


def test_arithmetic_on_float32_stays_there_though_casts_before_it_were_cheaper() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x + y)

    program = applied(PASS, seeded(Outer), (x_of(8, 1), x_of(1, 8)))
    (add,) = [node for node in program.graph.nodes if node.target is aten.add.Tensor]

    assert add.meta["val"].dtype == torch.float32


def test_an_input_is_cast_once_for_all_its_products() -> None:
    program = applied(PASS, seeded(lambda: Attention(16, 4, False, True)), (x_of(2, 6, 16),))

    assert graph_casts(program).count == 2  # the input down, the output up


def test_weights_are_stored_in_half_once() -> None:
    linear = seeded(lambda: nn.Linear(8, 8))
    program = applied(PASS, nn.Sequential(linear, nn.ReLU(), linear), (x_of(4, 8),))
    materialized = program.materialized()

    assert sorted(materialized.state) == ["0.bias_bfloat16", "0.weight_bfloat16"]
    assert torch.equal(
        materialized.tensor("0.weight_bfloat16"), linear.weight.detach().to(torch.bfloat16)
    )


def test_an_additive_mask_of_the_least_float_stays_finite() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.zeros(2, 1, 6, 6)
    mask[1] = torch.finfo(torch.float32).min
    program = applied(PASS, Masked(), (x_of(2, 2, 6, 8), mask)).materialized()
    (out,) = evaluate(program, (x_of(2, 2, 6, 8), mask))

    assert halves(program)
    assert bool(out.isfinite().all())


# Modes, policy, device


def test_full_changes_nothing_and_says_so() -> None:
    pass_ = Autocast(mode="full")
    program = capture(nn.Linear(8, 8), (x_of(4, 8),))
    plan = pass_.plan(program)

    assert pass_.claim == Exact()
    assert "everything stays in float32" in str(plan)
    assert pass_.apply(program, plan).graph is program.graph


def test_half_takes_norms_too() -> None:
    pass_ = Autocast(dtype=torch.bfloat16, mode="half", force=True)
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)))
    program = applied(pass_, model, (x_of(4, 8),))

    assert names(halves(program))["aten.layer_norm.default"] == 1
    assert graph_casts(program).count == 2
    assert program.output.args[0][0].meta["val"].dtype == torch.float32  # type: ignore[index,union-attr]


@pytest.mark.parametrize("glob", ["1", "aten.linear", "aten.linear.default", "*"])
def test_the_policy_names_modules_and_operators(glob: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    program = capture(model, (x_of(4, 8),))

    plan = planned(Autocast(policy={glob: "high"}, force=True), program)
    assert not [site for site in plan.sites if site.node.startswith("linear")]


def test_the_last_entry_of_the_policy_counts() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    program = capture(model, (x_of(4, 8),))
    plan = planned(Autocast(policy={"*": "high", "2": "low"}, force=True), program)

    assert [site.label for site in plan.sites] == ["2 (linear_1)"]


def test_a_policy_that_matches_nothing_is_told() -> None:
    program = capture(nn.Linear(8, 8), (x_of(4, 8),))
    (warning,) = planned(Autocast(policy={"classifer": "high"}, force=True), program).warnings

    assert warning == ("policy 'classifer' matches no module path and no operator of the graph")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"mode": "mix"},
            "give one of 'mixed', 'full', 'half'; did you mean 'mixed'?",
        ),
        (
            {"policy": {"*": "lo"}},
            "each one of 'low', 'high', 'either': {'*.classifier': 'high'}",
        ),
        ({"policy": "classifier"}, "give globs over module paths or operators"),
        ({"dtype": torch.int8}, "dtype"),
        ({"force": 1}, "give True or False"),
        ({"budget": 30}, "give decibels, as Sqnr(30.0), or None"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError) as error:
        Autocast(**options)

    assert text in str(error.value)
    assert "Autocast(" in str(error.value)


def test_the_spec_parses_back() -> None:
    from fxopt.pass_list import parse_passes

    pass_ = Autocast(
        dtype=torch.float16, policy={"*.head": "high"}, device="cuda:8.0", budget=Sqnr(40.0)
    )

    assert parse_passes(pass_.spec) == (pass_,)
    assert eval(repr(pass_), vars(fxopt) | {"torch": torch, "Device": fxopt.device.Device}) == pass_


def test_the_device_decides_what_auto_is() -> None:
    program = capture(nn.Linear(8, 8), (x_of(4, 8),))

    assert planned(Autocast(device="cuda:7.0"), program).dtype == torch.float16
    assert planned(Autocast(device="cuda:8.0"), program).dtype == torch.bfloat16


def test_a_device_without_half_units_refuses_each_product_with_the_reason() -> None:
    program = capture(nn.Linear(8, 8), (x_of(4, 8),))
    plan = planned(Autocast(device="cpu:none"), program)

    assert not plan.sites
    assert len(plan.refusals) == 1
    assert "emulated" in plan.refusals[0].reason


def test_float16_is_refused_on_a_cpu_without_a_unit_for_it_and_right_when_forced() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    device = "cpu:avx512_bf16"
    program = capture(model, (x_of(4, 8),))
    plan = planned(Autocast(dtype=torch.float16, device=device), program)

    assert not plan.sites
    assert "no instruction that multiplies torch.float16" in plan.refusals[0].reason
    forced = Autocast(dtype=torch.float16, device=device, force=True, claim=Sqnr(50.0))
    check(forced, model, (x_of(4, 8),), {"ComputeInHalf": 3})


# Range and sensitivity


class Large(nn.Module):
    """Its second linear makes values past float16's range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)) / 1e6)


def test_what_leaves_the_range_of_float16_is_refused_at_plan_time_and_named() -> None:
    model = seeded(Large)
    with torch.no_grad():
        model.second.weight.mul_(1e6)
    program = capture(model, (x_of(4, 8),))
    plan = planned(Autocast(dtype=torch.float16, force=True), program)

    (refusal,) = [refusal for refusal in plan.refusals if refusal.node.startswith("second")]
    assert "past float16's largest" in refusal.reason
    assert {site.label.split()[0] for site in plan.sites} >= {"first", "last"}
    (out,) = evaluate(
        Autocast(dtype=torch.float16, force=True).apply(program, plan).materialized(), (x_of(4, 8),)
    )
    assert sqnr(model(x_of(4, 8)), out) > 40


def test_bfloat16_holds_what_float16_cannot() -> None:
    model = seeded(Large)
    with torch.no_grad():
        model.second.weight.mul_(1e6)

    assert not planned(PASS, capture(model, (x_of(4, 8),))).refusals


def test_a_budget_pins_the_costliest_products_high() -> None:
    model = seeded(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))))
    program = capture(model, (x_of(32, 16),))
    (reference,) = evaluate(program, (x_of(32, 16),))
    free = evaluate(applied(PASS, model, (x_of(32, 16),)).materialized(), (x_of(32, 16),))
    budget = Sqnr(sqnr(reference, free[0]) + 3.0)
    pass_ = Autocast(dtype=torch.bfloat16, force=True, budget=budget)
    plan = planned(pass_, program)
    (out,) = evaluate(pass_.apply(program, plan).materialized(), (x_of(32, 16),))

    assert 0 < len([r for r in plan.refusals if "left in float32 by budget" in r.reason]) < 4
    assert sqnr(reference, out) >= budget.db


# Against torch.autocast


def under_autocast(model: nn.Module, call: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return [out.float() for out in tensors_of(copy.deepcopy(model)(**call))]


def many(drawn: Drawn) -> dict[str, Tensor]:
    """The example's inputs, so often that one rounding more or less doesn't decide a ratio."""
    ((name, x),) = drawn.example.items()
    if not x.is_floating_point():
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randint(0, 23, (64, 16), generator=generator)}
    return {name: x_of(64, *((16, x.shape[-1]) if x.ndim == 3 else x.shape[1:]))}


_MODELS = st.one_of(sequence_models(dtypes=_FLOATS), conv_models(dtypes=_FLOATS))


@in_parts(40)
@given(_MODELS)
def test_it_is_as_true_as_torch_autocast(drawn: Drawn) -> None:
    call = many(drawn)
    program = applied(PASS, drawn.model, drawn.example).materialized()
    inputs = program.signature.flatten((), call)
    with torch.no_grad():
        references = tensors_of(copy.deepcopy(drawn.model)(**call))
    theirs = under_autocast(drawn.model, call)
    for reference, ours, other in zip(references, evaluate(program, inputs), theirs, strict=True):
        assert sqnr(reference, ours) >= sqnr(reference, other) - 1.0


@in_parts(40)
@given(_MODELS, POLICIES, st.sampled_from(["mixed", "half"]))
def test_any_policy_gives_a_well_formed_graph_of_the_planned_dtypes(
    drawn: Drawn, policy: dict[str, Any], mode: Any
) -> None:
    pass_ = Autocast(dtype=torch.bfloat16, mode=mode, policy=policy, force=True)
    program = capture(drawn.model, drawn.example)
    plan = planned(pass_, program)
    result = pass_.apply(program, plan)

    wellformed.check(result)
    low = Counter(
        str(node.target)
        for node in program.graph.nodes
        if node.name in plan.low
        and node.target
        in (
            aten.linear.default,
            aten.gelu.default,
            aten.layer_norm.default,
            aten.tanh.default,
            aten.conv2d.default,
            aten.addmm.default,
        )
    )
    found = names(halves(result))
    assert low == {target: found[target] for target in low}
    again = planned(pass_, result)
    assert not again.sites, "a second run would change something"
    outputs = evaluate(result.materialized(), program.example)
    for reference, out in zip(evaluate(program, program.example), outputs, strict=True):
        assert out.dtype == reference.dtype
        assert bool(out.isfinite().all())


@in_parts(25)
@given(_MODELS)
def test_no_placement_of_a_model_casts_fewer_bytes(drawn: Drawn) -> None:
    program = capture(drawn.model, drawn.example)
    graph = cast_graph(program, sides_of(program, (), False))
    free = [value.name for value in graph.values if value.side == "either"]
    assume(0 < len(free) <= 12)
    fixed = [value.name for value in graph.values if value.side == "low"]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(free, size) for size in range(len(free) + 1)
    )
    found = [placed for low in subsets if (placed := priced(graph, (*fixed, *low))) is not None]

    assert cheapest_placement(graph).bytes == min(placed.bytes for placed in found)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5-encoder"])
def test_it_casts_far_less_than_torch_autocast(name: str) -> None:
    program = captured(name)
    program = Canonicalize().apply(program, Canonicalize().plan(program))
    plan = planned(PASS, program)
    ours = graph_casts(PASS.apply(program, plan))

    assert plan.placement is not None
    assert ours.bytes == plan.placement.bytes
    assert ours.weights == 0
    assert ours.bytes <= 0.3 * autocast_casts(program, torch.bfloat16).bytes


def test_the_plan_shows_the_casts_beside_torch_autocasts() -> None:
    program = capture(seeded(lambda: GatedMlp(8, 16, True)), (x_of(2, 4, 8),))
    text = str(planned(PASS, program))

    assert (
        "in a call 2 casts, 0.8 kB: 0 of weights (0.0 kB), 2 of activations (0.8 kB); no placement"
        in text
    )
    assert "torch.autocast: 8 casts" in text
    assert "region at gate: linear x 3, silu, mul" in text


# Training


@in_parts(20)
@given(sequence_models(dtypes=_FLOATS), st.integers(0, 9))
def test_gradients_are_those_of_float32_within_bfloat16(drawn: Drawn, seed: int) -> None:
    model = copy.deepcopy(drawn.model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    opt = fxopt.transform(model, [PASS], example_inputs=drawn.example, mode="train", verify=False)

    def gradients(run: nn.Module, autocast: bool = False) -> list[Tensor]:
        run.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = tensors_of(run(**drawn.example))
        generator = torch.Generator().manual_seed(seed)
        loss = sum(
            (out.float() * torch.randn(out.shape, generator=generator)).sum() for out in outputs
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    reference = [grad.clone() for grad in gradients(model)]
    theirs = [grad.clone() for grad in gradients(model, autocast=True)]
    ours = gradients(opt)
    assert all(grad.dtype == torch.float32 for grad in ours)
    assert len(ours) == len(reference)
    whole = [torch.cat([grad.flatten() for grad in one]) for one in (reference, ours, theirs)]
    assert sqnr(whole[0], whole[1]) >= min(20.0, sqnr(whole[0], whole[2]) - 3.0)


def test_masters_stay_float32_and_casts_are_differentiable() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    opt = fxopt.transform(
        model.train(), [PASS], example_inputs=(x_of(4, 8),), mode="train", verify=False
    )

    assert {name for name, _ in opt.named_parameters()} == set(model.state_dict())
    assert all(p.dtype == torch.float32 for p in opt.parameters())
    opt(x_of(4, 8)).sum().backward()
    assert all(p.grad is not None for p in opt.parameters())


def test_it_can_be_lowered_and_judged_on_a_real_architecture() -> None:
    shared = case("bert")
    opt = fxopt.transform(canonicalized("bert"), ["canonicalize, fuse-linears", PASS, "prepack"])
    record = opt.report.steps[3]

    assert record.name == "autocast"
    assert isinstance(PASS.claim, Sqnr | Close)
    assert opt(**shared.others[0]).last_hidden_state.dtype == torch.float32
