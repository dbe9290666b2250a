"""What the tables of views say of each operator in them, against what it gives; and their users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt import Canonicalize, FoldPruned
from fxopt.analyses.constant_channels import constant_channels
from fxopt.analyses.view_axes import Layout, is_view, through_view
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.operators import (
    CASTS,
    EXPANSIONS,
    PERMUTATIONS,
    RESHAPES,
    RESHAPES_BY_STRIDES,
    RESHAPES_LIKE,
    SPLITS,
    UNCHANGED,
    VIEWS,
    WHOLE_VIEWS,
    permutation,
)
from tests.check import check
from tests.rewriting.functions import calls, program_of

aten = torch.ops.aten

_GIVEN: dict[Any, tuple[Any, ...]] = {
    aten.permute.default: ([1, -1, 0],),
    aten.transpose.int: (0, -1),
    aten.swapaxes.default: (0, 2),
    aten.swapdims.default: (-2, 0),
    aten.movedim.int: (0, -1),
    aten.moveaxis.int: (2, 0),
    aten.movedim.intlist: ([0, 1], [-1, 0]),
    aten.moveaxis.intlist: ([1, 2], [0, 1]),
    aten.reshape.default: ([5, -1],),
    aten.view.default: ([4, 15],),
    aten._unsafe_view.default: ([60],),
    aten.flatten.using_ints: (1,),
    aten.unflatten.int: (1, [2, 2]),
    aten.view_as.default: (torch.empty(60),),
    aten.reshape_as.default: (torch.empty(12, 5),),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0],),
    aten.unsqueeze.default: (-1,),
    aten.expand.default: ([2, 3, 4, 5],),
    aten.expand_as.default: (torch.empty(2, 3, 4, 5),),
    aten.slice.Tensor: (1, 1, 3),
    aten.select.int: (1, 0),
}
_SPLIT: dict[Any, Any] = {
    aten.split.Tensor: 3,
    aten.split.sizes: [1, 4],
    aten.split_with_sizes.default: [1, 4],
    aten.chunk.default: 2,
    aten.tensor_split.sections: 2,
    aten.tensor_split.indices: [1],
}
_CAST: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.to.dtype: ((torch.float64,), {}),
    aten.to.dtype_layout: ((), {"dtype": torch.float64}),
    aten.to.device: (("cpu", torch.float64), {}),
    aten.to.other: ((torch.zeros(1, dtype=torch.float64),), {}),
    aten._to_copy.default: ((), {"dtype": torch.float64}),
    aten.type_as.default: ((torch.zeros(1, dtype=torch.float64),), {}),
}


def operand_of(target: Any) -> Tensor:
    """Numbers all different, of rank 2 for what transposes matrices alone."""
    return torch.arange(60.0).view((12, 5) if target is aten.t.default else (3, 4, 5))


def called(target: Any, x: Tensor) -> fx.Node:
    """A call of `target` on a node that holds `x`, with its value."""
    operand = fx.Graph().placeholder("x")
    operand.meta["val"] = x
    args = _GIVEN.get(target, ())
    node = operand.graph.call_function(target, (operand, *args))
    node.meta["val"] = target(x, *args)
    return node


@pytest.mark.parametrize("target", VIEWS, ids=str)
def test_a_view_holds_entries_of_its_operand(target: Any) -> None:
    x = operand_of(target)
    entries = set(called(target, x).meta["val"].flatten().tolist())
    assert entries <= set(x.flatten().tolist())
    assert (entries == set(x.flatten().tolist())) == (target in WHOLE_VIEWS)


@pytest.mark.parametrize("target", [*RESHAPES, *RESHAPES_LIKE], ids=str)
def test_a_reshape_keeps_the_order_of_entries(target: Any) -> None:
    x = operand_of(target)
    assert torch.equal(called(target, x).meta["val"].flatten(), x.flatten())


@pytest.mark.parametrize("target", RESHAPES_BY_STRIDES, ids=str)
def test_such_a_reshape_copies_where_the_strides_ask_for_it(target: Any) -> None:
    dense, turned = (
        torch.arange(60.0).view(3, 4, 5),
        torch.arange(60.0).view(5, 4, 3).permute(2, 1, 0),
    )
    shares = [called(target, x).meta["val"].data_ptr() == x.data_ptr() for x in (dense, turned)]
    assert shares == [True, False]


@pytest.mark.parametrize("target", PERMUTATIONS, ids=str)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_a_permutation_is_known_and_followed(target: Any) -> None:
    x = operand_of(target)
    node = called(target, x)
    order = permutation(node)
    assert torch.equal(node.meta["val"], x.permute(order))
    assert is_view(node)
    found = through_view(node, Layout.of_last_axis(node))
    assert isinstance(found, Layout)
    assert found.axes == (order[-1],)


@pytest.mark.parametrize("target", [*RESHAPES_LIKE, *EXPANSIONS], ids=str)
def test_views_like_another_tensor_are_followed(target: Any) -> None:
    node = called(target, torch.arange(60.0).view(3, 4, 5))
    assert is_view(node)
    assert isinstance(through_view(node, Layout.of_last_axis(node)), Layout)


@pytest.mark.parametrize("target", SPLITS, ids=str)
def test_a_split_takes_the_axis_third(target: Any) -> None:
    x = torch.arange(60.0).view(3, 4, 5)
    parts = target(x, _SPLIT[target], 2)
    assert torch.equal(torch.cat(parts, 2), x)
    assert target._schema.arguments[2].name == "dim"


@pytest.mark.parametrize("target", UNCHANGED, ids=str)
def test_what_changes_nothing(target: Any) -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(target(x), x)


@pytest.mark.parametrize("target", CASTS, ids=str)
def test_a_cast_keeps_values(target: Any) -> None:
    x = torch.arange(6.0).view(2, 3)
    args, kwargs = _CAST[target]
    assert torch.equal(target(x, *args, **kwargs), x.double())


class Same(nn.Module):
    """Views that show all of x as it stands, in spellings that no older list had."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, 1).squeeze(0).unflatten(1, (-1,)).view_as(x).expand_as(x).flatten(1)
        return x + 1


def test_views_of_all_as_it_stands_are_dropped() -> None:
    result = check(Canonicalize(), Same(), (torch.randn(3, 4),), {"DropIdentity": 6})
    assert len(calls(result)) == 1


class Moved(nn.Module):
    """Channels that are moved, split by tensor_split, and moved back, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(4, 2)
        with torch.no_grad():
            self.second.weight[:, 1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.movedim(self.first(x), -1, 0)
        gate, value = torch.tensor_split(y, 2)
        return self.second(torch.moveaxis(gate.sigmoid() * value, 0, -1))


def test_channels_are_cut_through_what_moves_and_splits_them() -> None:
    model, x = Moved().eval(), torch.randn(2, 5, 3)
    program, fold = capture(model, (x,)), FoldPruned()
    result = fold.apply(program, fold.plan(program)).materialized()
    assert result.state["first.weight"].shape == (6, 3)
    torch.testing.assert_close(evaluate(result, (x,))[0], model(x))


def test_weights_rounded_to_integers_do_not_sum_to_one() -> None:
    def attend(x: Tensor) -> Tensor:
        return x.softmax(-1).long() @ torch.full_like(x, 3.0).long()

    program = program_of(attend, torch.randn(4, 4))
    (output,) = program.output.args[0]  # type: ignore[misc]
    assert constant_channels(program).get(output) is None  # type: ignore[arg-type]
