"""Channels are followed through any views, or the answer is a reason."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fxopt.analyses.view_axes import Layout, is_view, through_view

aten = torch.ops.aten
_SHAPE = (3, 5, 12)
_VIEWS = st.sampled_from(["split", "merge", "swap", "unsqueeze", "expand", "slice", "fold"])


def view_of(value: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = value.graph.call_function(target, (value, *args))
    node.meta["val"] = target(value.meta["val"], *args)
    return node


def operand() -> fx.Node:
    node = fx.Graph().placeholder("x")
    generator = torch.Generator().manual_seed(0)
    node.meta["val"] = torch.randn(_SHAPE, generator=generator)
    return node


def drawn_view(name: str, value: fx.Node) -> fx.Node:
    """`value` under one more view, where it has a shape for it; axes from 2 on hold channels."""
    shape = list(value.meta["val"].shape)
    rank = len(shape)
    if name == "split" and shape[-1] % 2 == 0:
        return view_of(value, aten.view.default, [*shape[:-1], 2, shape[-1] // 2])
    if name == "merge" and rank > 3:
        return view_of(value, aten.reshape.default, [*shape[:-2], -1])
    if name == "swap":
        axes = (-1, -2) if rank > 3 else (0, 1)
        return view_of(value, aten.transpose.int, *axes)
    if name == "unsqueeze":
        return view_of(value, aten.unsqueeze.default, 2)
    if name == "expand" and rank < 6:
        wide = view_of(value, aten.unsqueeze.default, 2)
        return view_of(wide, aten.expand.default, [-1, -1, 2, *shape[2:]])
    if name == "slice" and shape[1] > 1:
        return view_of(value, aten.slice.Tensor, 1, 1, 1 << 40)
    if name == "fold" and rank == 3:
        folded = view_of(value, aten.flatten.using_ints, 0, 1)
        return view_of(folded, aten.unsqueeze.default, 0)
    return value


def replayed(view: fx.Node, value: Tensor) -> Tensor:
    if view.op == "placeholder":
        return value
    source: Any = view.args[0]
    return view.target(replayed(source, value), *view.args[1:])  # type: ignore[operator, no-any-return]


@settings(max_examples=300)
@given(st.lists(_VIEWS, max_size=7))
def test_a_scale_of_a_views_channels_is_one_of_its_operands(names: list[str]) -> None:
    x = view = operand()
    for name in names:
        view = drawn_view(name, view)
    last = view = view_of(view, aten.flatten.using_ints, 2, -1)
    layout: Layout | str = Layout.of_last_axis(view)
    while is_view(view):
        assert isinstance(layout, Layout)
        layout = through_view(view, layout)
        view = view.args[0]  # type: ignore[assignment]
    assert isinstance(layout, Layout)
    shared = (1.0 + torch.arange(last.meta["val"].shape[-1]))[layout.ties]
    assert len(shared.unique()) == 12, "every channel of the operand has a scale of its own"
    sizes = [size if axis in layout.axes else 1 for axis, size in enumerate(_SHAPE)]
    scaled = replayed(last, x.meta["val"] * shared[layout.index].reshape(sizes))
    assert torch.allclose(scaled, last.meta["val"] * shared)


def test_axes_that_mix_channels_with_others_give_the_reason() -> None:
    x = operand()
    merged = view_of(x, aten.reshape.default, [3, 60])
    half = Layout((1,), torch.arange(12)).padded(1, 0, 60)
    assert isinstance(through_view(merged, half), Layout)
    split = view_of(x, aten.view.default, [3, 4, 15])
    answer = through_view(split, Layout.of_last_axis(split))
    assert answer == "view_default mixes channels with other axes"
    cut = view_of(x, aten.slice.Tensor, 2, 4, 8)
    assert through_view(cut, Layout.of_last_axis(cut)) == "slice_tensor cuts channels off"


def test_a_part_of_a_longer_axis_leaves_the_rest_without_channels() -> None:
    layout = Layout((2,), torch.arange(2)).padded(2, 3, 6)
    assert layout.index.tolist() == [-1, -1, -1, 0, 1, -1]
    lifted = Layout((1,), torch.arange(2)).with_axis(0, 3, -1)
    assert lifted.axes == (0, 2)
    assert lifted.index.tolist() == [[-1, -1], [-1, -1], [0, 1]]
