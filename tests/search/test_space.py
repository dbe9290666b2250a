"""A space says what is searched, holds hand-written lists, and makes lists that transform takes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt import kernels
from fxopt.device import Device
from fxopt.errors import PassError
from fxopt.pass_list import resolve_passes
from fxopt.passes.quantization import int8_planning, quantize_linear
from fxopt.search import SearchError, Slot, Space, standard_space
from fxopt.search.standard import costly_linears, first_points
from fxopt.timing import Latency, summarize, timings_in
from tests.train.models import bert, text_batch

FAST = Device("cpu", "a fast one", frozenset({"avx512_vnni", "avx512_bf16"}))
PLAIN = Device("cpu", "a plain one")
GPU = Device("cuda", "a GPU", capability=(9, 0), triton=True)
OLD_GPU = Device("cuda", "an old GPU", capability=(7, 0), triton=True)
COSTLY = ("a.query|a.key", "b.dense", "c.dense")


def test_a_space_prints_one_slot_a_line() -> None:
    space = Space(
        (
            Slot("smooth", ("", "smooth-quant"), "int8"),
            Slot("int8", ("int8-linear", "int8-linear{mode=static}")),
        )
    )
    assert str(space) == (
        "smooth: (none) | smooth-quant   if there is int8\n"
        "int8: int8-linear | int8-linear{mode=static}"
    )


def test_what_only_goes_with_another_slot_is_left_out_without_it() -> None:
    space = Space(
        (Slot("smooth", ("smooth-quant",), "int8"), Slot("int8", ("", "int8-linear, lower")))
    )
    assert space.passes(space.point()) == ""
    assert space.passes(space.point(int8="int8-linear, lower")) == (
        "smooth-quant, int8-linear, lower"
    )


@pytest.mark.parametrize("device", [FAST, PLAIN, GPU], ids=lambda device: device.name)
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_list_of_the_standard_space_can_be_pasted(device: Device, calibrated: bool) -> None:
    space = standard_space(device, calibrated, COSTLY)
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        point = {
            slot.name: slot.choices[int(torch.randint(len(slot.choices), (1,), generator=draws))]
            for slot in space.slots
        }
        assert resolve_passes(space.passes(point))
    for point in first_points(space):
        assert space.holds(point)
        assert resolve_passes(space.passes(point))


def slot(device: Device, name: str, calibrated: bool = True) -> tuple[str, ...]:
    space = standard_space(device, calibrated, COSTLY)
    return next((one.choices for one in space.slots if one.name == name), ())


def test_the_standard_space_is_what_the_device_is_fast_at() -> None:
    assert slot(PLAIN, "half") == ()
    assert slot(FAST, "half") == ("", "autocast", "autocast{mode=half}")
    assert "int8-linear{mode=static}" in slot(FAST, "int8")
    assert "int8-linear{mode=static, exclude=a.query|a.key|b.dense}" in slot(FAST, "int8")
    assert slot(FAST, "int8", False) == ("", "int8-linear{mode=weight_only}", "int8-linear")
    assert slot(FAST, "smooth", False) == ()
    assert slot(GPU, "prepack") == ()
    assert "lower{mode=max-autotune}" in slot(GPU, "lower")


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_cpu_without_a_dot_product_is_offered_what_others_are(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_onednn", lambda: True)
    for name in ("int8", "smooth", "split"):
        assert slot(PLAIN, name, calibrated) == slot(FAST, name, calibrated)
    firsts = [point["int8"] for point in first_points(standard_space(PLAIN, calibrated))]
    assert ("int8-linear{mode=static}" in firsts) == calibrated
    assert "int8-linear" in firsts


@pytest.mark.parametrize(("device", "onednn"), [(PLAIN, False), (OLD_GPU, True), (OLD_GPU, False)])
def test_without_a_fast_product_weights_alone_are_int8(
    device: Device, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_onednn", lambda: onednn)
    assert slot(device, "int8") == ("", "int8-linear{mode=weight_only}")
    assert slot(device, "smooth") == ()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_what_is_offered_without_a_dot_product_rewrites_there(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice_as_fast(key: object, systems: Mapping[str, object]) -> dict[str, Latency]:
        return {name: summarize([1.0 if name == "float" else 0.5] * 9) for name in systems}

    monkeypatch.setattr(kernels, "has_onednn", lambda: True)
    for module in (int8_planning, quantize_linear):
        monkeypatch.setattr(module, "saturates", lambda device: True)
    offered = next(choice for choice in slot(PLAIN, "int8") if resolves_to(choice, mode))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with timings_in(None, twice_as_fast):
        made = fxopt.transform(
            nn.Linear(8, 4).eval(), offered, example_inputs=x, calibration=[x], measure_cost=False
        )
    assert made.steps[-1].record.fired
    assert "weights of 7 bits" in " ".join(made.steps[-1].record.details)


def resolves_to(choice: str, mode: str) -> bool:
    passes = resolve_passes(choice) if choice else ()
    return any(isinstance(one, fxopt.Int8Linear) and one.mode == mode for one in passes)


def test_the_lists_tried_first_are_those_an_engineer_would_write() -> None:
    space = standard_space(FAST, True, COSTLY)
    lists = [space.passes(point) for point in first_points(space)]
    assert lists[:5] == [
        "canonicalize",
        "canonicalize, fuse-linears, prepack, lower",
        "canonicalize, fuse-linears, autocast, prepack, lower",
        "canonicalize, fuse-linears, int8-linear, autocast, prepack, lower",
        "canonicalize, fuse-linears, int8-linear{mode=static}, autocast, prepack, lower",
    ]
    assert lists[5] == (
        "canonicalize, fuse-linears, smooth-quant{alpha=auto, mode=static}, "
        "int8-linear{mode=static}, autocast, prepack, lower"
    )
    assert lists[-1].count("exclude=a.query|a.key") == 1


def test_a_space_grows_by_a_list() -> None:
    space = standard_space(FAST, True)
    passes = "canonicalize, fuse-linears, smooth-quant{alpha=0.3}, int8-linear, lower"
    grown, point = space.including(passes)
    assert grown.passes(point) == passes
    assert grown.holds(point)
    assert not space.holds(point)
    again, same = grown.including(passes)
    assert (again, same) == (grown, point)


def test_a_list_that_no_slot_takes_is_refused() -> None:
    with pytest.raises(SearchError) as caught:
        Space.of([["canonicalize"], ["lower"]]).including("lower, canonicalize")
    assert str(caught.value) == (
        "start= has the list 'lower, canonicalize', but no slot of the space takes canonicalize "
        "there. The space:\n1: canonicalize: canonicalize\n2: lower: lower"
    )


@given(st.lists(st.lists(st.sampled_from(["", "canonicalize", "autocast", "lower"]), unique=True,
                         min_size=1), min_size=1, max_size=4))  # fmt: skip
def test_a_space_comes_back_from_plain_values(alternatives: list[list[str]]) -> None:
    space = Space.of(alternatives)
    assert Space.from_plain(space.to_plain()) == space
    points = list(space.points())
    assert len(points) == space.size
    assert all(space.holds(point) for point in points)


def test_modules_of_any_name_are_excluded_by_their_paths() -> None:
    """Also where a name looks like what a table prints of a group."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("up", "a + b", "c (d", "{e}")
            self.linears = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

        def forward(self, x: Tensor) -> Tensor:
            up, *others = self.linears.values()
            y = up(x).relu()
            return torch.stack([one(y) for one in others])

    def much_faster(key: object, systems: Mapping[str, object]) -> dict[str, Latency]:
        return {name: summarize([9.0 if name == "float" else 1.0] * 9) for name in systems}

    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with timings_in(None, much_faster):
        costly = costly_linears(Named(), (x,), [(x,)], lambda line: None)
    assert set(costly) == {"linears.up", "linears.a + b|linears.c (d|linears.{e}"}


def test_the_costliest_linears_are_asked_of_the_model() -> None:
    batches = [text_batch(seed, 4) for seed in range(2)]
    model = bert().eval()
    lines: list[str] = []
    costly = costly_linears(model, batches[0], batches, lines.append)
    table = {name for group in costly for name in group.split("|")}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert table == linears
    attention = "bert.encoder.layer.0.attention.self"
    assert f"{attention}.query|{attention}.key|{attention}.value" in costly
    assert lines == ["asking which linears int8 costs most"]
    spec = f"int8-linear{{mode=static, where=always, exclude={'|'.join(costly[:2])}}}"
    made = fxopt.transform(
        model, f"fuse-linears, {spec}", example_inputs=batches[0], calibration=batches,
        measure_cost=False,
    )  # fmt: skip
    refused = " ".join(str(refusal) for refusal in made.steps[-1].record.refused)
    assert all(name in refused for name in costly[0].split("|"))


@pytest.mark.parametrize(
    ("alternatives", "message"),
    [
        ([], "the space has no slot: give a list of alternatives for each place of a pass list"),
        (["lower"], "slot 1 of space= is 'lower': give a list of alternatives, such as"),
        ([[]], "slot '1: none' of the space has () to choose from: give it at least one"),
        ([["lower", "lower"]], "slot '1: lower' of the space has ('lower', 'lower') to choose"),
        ([[3]], "slot '1: none' of the space holds 3: alternatives are textual specs, such as"),
    ],
)
def test_a_wrong_space_says_where(alternatives: list[list[str]], message: str) -> None:
    with pytest.raises(SearchError) as caught:
        Space.of(alternatives)
    assert message in str(caught.value)


def test_two_slots_of_one_name_and_a_missing_one_are_refused() -> None:
    with pytest.raises(SearchError, match="two slots of the space are named 'a'; rename one"):
        Space((Slot("a", ("",)), Slot("a", ("",))))
    with pytest.raises(SearchError, match="slot 'a' depends on 'b', no slot here"):
        Space((Slot("a", ("",), "b"),))


def test_an_unknown_pass_is_an_error_before_anything_runs() -> None:
    with pytest.raises(PassError) as caught:
        Space.of([["canonicalise"]])
    assert str(caught.value).startswith(
        "slot '1: canonicalise' of the space: unknown pass 'canonicalise'; did you mean "
        "'canonicalize'?"
    )
