"""Passes that change outputs by intent: held to their oracle, and so is what comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt.claim import Claim, Close, Sqnr
from fxopt.errors import EquivalenceError, WellFormedError
from fxopt.nodes import label
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Conversion, Pass, Plan, Site, convert

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
Fault = Literal["", "swapped", "bias", "fails"]


class Blocks(nn.Module):
    """x + down(gelu(up(x))), three times, with dropout where training sees it."""

    def __init__(self, dropout: float = 0.0, depth: int = 3) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(6, 8) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(8, 6) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(self.dropout(nn.functional.gelu(up(x))))
        return x


def blocks(**options: Any) -> Blocks:
    torch.manual_seed(0)
    return Blocks(**options).eval()


class Halve(Conversion):
    """Every second channel leaves, wrongly so in a `guilty` layer."""

    def __init__(self, layers: Sequence[str], fault: Fault, guilty: str) -> None:
        self.layers, self.fault, self.guilty = layers, fault, guilty
        self.fired = len(layers)

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        kind, layer, leaf = str(node.target).split(".")
        if layer not in self.layers or (kind, leaf) == ("downs", "bias"):
            return tensor
        assert isinstance(tensor, Tensor)
        fault = self.fault if layer == self.guilty else ""
        if kind == "ups":
            return tensor[::2] * (0.9 if fault == "bias" and leaf == "bias" else 1.0)
        return tensor[:, [2, 0, 4, 6] if fault == "swapped" else [0, 2, 4, 6]]


class Mask(Conversion):
    """Every second column of the readers is zero."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        kind, layer, leaf = str(node.target).split(".")
        if layer not in self.layers or (kind, leaf) != ("downs", "weight"):
            return tensor
        assert isinstance(tensor, Tensor)
        return tensor * torch.tensor([1.0, 0.0] * 4)


@dataclass(frozen=True, repr=False)
class HalveWidths(Pass):
    """Halves each hidden width; its oracle zeroes the columns that read the other half."""

    fault: Fault = ""
    guilty: str = "1"
    name: ClassVar[str] = "halve-widths"
    claim: Claim = Close()

    def plan(self, program: Program) -> Plan:
        downs = [n for n in program.graph.nodes if n.meta["val"] is not None and _is_down(n)]
        sites = [
            Site("Halve", n.name, label(n)) for n in downs if n.args[0].meta["val"].shape[-1] > 4
        ]
        return Plan(repr(self), tuple(sites), details=("every second channel",))

    def apply(self, program: Program, plan: Plan) -> Program:
        return convert(program, Halve(_layers(plan), self.fault, self.guilty), "Halve")

    def oracle(self, program: Program, plan: Plan) -> Program:
        return convert(program, Mask(_layers(plan)), "Mask")


def _is_down(node: fx.Node) -> bool:
    is_linear = node.target is torch.ops.aten.linear.default
    return is_linear and str(node.args[1]).startswith("downs")


def _layers(plan: Plan) -> list[str]:
    return [site.label.split(".")[1].split(" ")[0] for site in plan.sites]


def halved(model: Blocks, x: Tensor, layers: Sequence[int] = (0, 1, 2)) -> Tensor:
    for index, (up, down) in enumerate(zip(model.ups, model.downs, strict=True)):
        hidden = nn.functional.gelu(up(x))
        weight = down.weight * torch.tensor([1.0, 0.0] * 4) if index in layers else down.weight
        x = x + nn.functional.linear(hidden, weight, down.bias)  # type: ignore[arg-type]
    return x


def test_a_right_cut_is_held_to_its_oracle() -> None:
    model = blocks()
    opt = fxopt.transform(model, [HalveWidths()], example_inputs=(X,))
    torch.testing.assert_close(opt(X), halved(model, X))
    assert not torch.allclose(opt(X), model(X), atol=1e-2)
    step = opt.report.steps[1]
    assert step.holds
    assert step.measured.startswith("relative error ")
    assert step.fired == {"Halve": 3}
    first, second = step.details
    assert first == "every second channel"
    assert second.startswith("against the model before it: ")
    assert second.endswith(" dB (pruning changes outputs by intent)")
    assert 0.0 < float(second.split(": ")[1].split(" ")[0]) < 40.0
    assert second in str(opt.report)


def test_the_whole_list_is_held_to_the_last_oracle_on_another_size_too() -> None:
    opt = fxopt.transform(blocks(), [HalveWidths(), "int8-linear"], example_inputs=(X,))
    text = opt.report.end_to_end
    assert text is not None
    assert text.startswith("sqnr >= ")
    assert text.endswith(" over 3 inputs, against what HalveWidths() means to compute")
    alone = fxopt.transform(blocks(), [HalveWidths()], example_inputs=(X,)).report.end_to_end
    assert alone is not None
    assert alone.startswith("close; measured relative error ")
    first = fxopt.transform(blocks(), ["canonicalize", HalveWidths()], example_inputs=(X,))
    assert first.report.end_to_end == alone, "claims from before the oracle don't count"


def test_what_a_later_pass_breaks_is_still_seen() -> None:
    with pytest.raises(EquivalenceError, match="Int8Linear"):
        fxopt.transform(
            blocks(), [HalveWidths(), "int8-linear{claim=sqnr(90)}"], example_inputs=(X,)
        )


@pytest.mark.parametrize("guilty", ["0", "1", "2"])
@pytest.mark.parametrize("fault", ["swapped", "bias"])
def test_a_wrong_cut_is_caught_and_its_reader_named(fault: Fault, guilty: str) -> None:
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(blocks(), [HalveWidths(fault, guilty)], example_inputs=(X,))
    text = str(caught.value)
    assert text.startswith(f"HalveWidths(fault='{fault}', ") or guilty == "1"
    assert f"dB on its own): downs.{guilty} (" in text
    assert "dB on its own): downs" in text


def test_a_wrong_cut_is_reverted_alone() -> None:
    model = blocks()
    opt = fxopt.transform(
        model, [HalveWidths("swapped", "1")], example_inputs=(X,), on_violation="revert"
    )
    (reverted,) = opt.report.steps[1].reverted
    assert reverted.node.startswith("downs.1 (")
    assert "broke close" in reverted.reason
    assert opt.report.steps[1].fired == {"Halve": 2}
    torch.testing.assert_close(opt(X), halved(model, X, (0, 2)))


def test_where_nothing_is_left_of_a_pass_the_original_is_the_reference_again() -> None:
    model = blocks(depth=1)
    opt = fxopt.transform(
        model, ["canonicalize", HalveWidths("swapped", "0")], example_inputs=(X,),
        on_violation="revert",
    )  # fmt: skip
    assert opt.report.steps[2].fired == {}
    assert "means to compute" not in str(opt.report.end_to_end)
    assert torch.equal(opt(X), model(X))


def test_a_budget_is_against_the_original() -> None:
    opt = fxopt.transform(blocks(), [HalveWidths()], example_inputs=(X,), budget=Sqnr(1.0))
    assert str(opt.report.end_to_end).startswith("sqnr >= 1 dB; measured ")
    assert str(opt.report.end_to_end).endswith(" dB over 3 inputs")
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(blocks(), [HalveWidths()], example_inputs=(X,), budget=Sqnr(60.0))
    text = str(caught.value)
    assert text.startswith("the whole list broke its claim\n  claimed: sqnr >= 60 dB")
    assert text.endswith(
        "\n  pruning changes outputs by intent: HalveWidths() was right about what it means to "
        "compute, but budget= keeps the original's outputs: prune less, loosen budget=, or leave "
        "it out"
    )


def test_a_cut_trains_and_its_gradients_are_judged() -> None:
    model = blocks()
    opt = fxopt.transform(model, [HalveWidths()], example_inputs=(X,), mode="train")
    opt.train()
    opt(X).square().mean().backward()
    parameters = dict(opt.named_parameters())
    assert {tuple(p.shape) for name, p in parameters.items() if "ups" in name} == {(4, 6), (4,)}
    assert all(p.grad is not None for p in parameters.values())
    assert parameters["downs.0.bias"] is model.downs[0].bias

    @dataclass(frozen=True, repr=False)
    class StopsGradients(HalveWidths):
        """Right outputs, and a residual stream that learns nothing"""

        name: ClassVar[str] = "stops-gradients"

        def apply(self, program: Program, plan: Plan) -> Program:
            class Detach(Halve):
                def call(self, node: fx.Node, args: Any, kwargs: Any, build: Any) -> fx.Node | None:
                    if node.target is not torch.ops.aten.gelu.default:
                        return None
                    return build(torch.ops.aten.detach.default, build(node.target, *args))  # type: ignore[no-any-return]

            return convert(program, Detach(_layers(plan), "", ""), "Halve")

    with pytest.raises(EquivalenceError, match=r"in the gradient of downs\.0\.bias"):
        fxopt.transform(model, [StopsGradients()], example_inputs=(X,), mode="train")


def test_a_cut_that_changes_what_dropout_draws_for_is_judged_without_it() -> None:
    model = blocks(dropout=0.3)
    opt = fxopt.transform(model, [HalveWidths(), "canonicalize"], example_inputs=(X,), mode="train")
    assert opt.report.steps[1].holds
    assert "over 3 inputs, against what HalveWidths()" in str(opt.report.end_to_end)
    torch.testing.assert_close(opt.eval()(X), halved(model, X))
    with pytest.raises(EquivalenceError, match=r"downs\.2"):
        fxopt.transform(
            model, [HalveWidths("swapped", "2")], example_inputs=(X,), mode="train"
        )  # fmt: skip
    with pytest.raises(EquivalenceError, match="pruning changes outputs by intent"):
        fxopt.transform(
            model, [HalveWidths()], example_inputs=(X,), mode="train", budget=Sqnr(60.0)
        )


def test_an_oracle_must_be_well_formed() -> None:
    @dataclass(frozen=True, repr=False)
    class Broken(HalveWidths):
        """Its oracle misses a tensor"""

        name: ClassVar[str] = "broken"

        def oracle(self, program: Program, plan: Plan) -> Program:
            return replace(program, state={})

    with pytest.raises(WellFormedError, match="the state has no entry"):
        fxopt.transform(blocks(), [Broken()], example_inputs=(X,))


def test_a_second_cut_starts_from_the_first() -> None:
    opt = fxopt.transform(blocks(), [HalveWidths(), HalveWidths()], example_inputs=(X,))
    assert opt.report.steps[2].fired == {}
    assert opt.report.steps[2].measured == "unchanged"
    assert str(opt.report.end_to_end).endswith("against what HalveWidths() means to compute")


def test_the_difference_shows_the_shapes_of_kept_names() -> None:
    opt = fxopt.transform(blocks(), [HalveWidths()], example_inputs=(X,))
    lines = opt.steps[0].graph.diff(opt.graph).splitlines()
    up = next(line for line in lines if "0.weight" in line)
    assert up.startswith("~  %0: f32[s0, s1, 8] -> f32[s0, s1, 4] = linear(%x, ")
    assert "0.weight: f32[8, 6] -> f32[4, 6], 0.bias: f32[8] -> f32[4])" in up
    assert any(line.startswith("~") and "f32[6, 8] -> f32[6, 4]" in line for line in lines)
    assert not any(line.startswith(("+ ", "- ")) for line in lines)
