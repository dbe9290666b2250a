"""Every operator of the table of windows passes channels, and the constants in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.analyses.channels import channels
from fxopt.analyses.constant_channels import constant_channels
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.operators import MAX_POOLINGS, WINDOWED
from tests.rewriting.functions import program_of

_CASES = [(target, rank) for rank, targets in WINDOWED.items() for target in targets]
_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def windowed(target: Any, rank: int, x: Tensor) -> Tensor:
    """The values that `target` gives for windows of 2, or for 3 positions along each axis."""
    given: dict[str, Any] = {
        "kernel_size": [2] * rank,
        "output_size": [3] * rank,
        "align_corners": False,
    }
    given["scale_factors"] = None
    names = [argument.name for argument in target._schema.arguments]
    result = target(x, *(given[name] for name in names[1:] if name in given))
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("target", "rank"), _CASES, ids=str)
def test_a_window_passes_channels(target: Any, rank: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = _LAYERS[rank](3, 4, 1), _LAYERS[rank](4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(windowed(target, rank, self.first(x)))

    program = capture(Model().eval(), (torch.randn(2, 3, *[4] * rank),))
    (group,) = channels(program).cuttable
    assert group.size == 4
    assert [reader.weight and reader.weight.name for reader in group.readers] == ["second.weight"]


@pytest.mark.parametrize(("target", "rank"), _CASES, ids=str)
def test_a_window_of_one_number_has_that_value(target: Any, rank: int) -> None:
    x = torch.randn(2, 1, *[4] * rank, dtype=torch.float64)
    program = program_of(
        lambda x: windowed(target, rank, torch.cat([torch.full_like(x, 0.5), x], 1)), x
    )
    (output,) = program.output.args[0]  # type: ignore[misc]
    known = constant_channels(program)[output]  # type: ignore[index]
    assert known.mask.flatten().tolist() == [True, False]
    assert known.values.flatten()[0] == 0.5
    (value,) = evaluate(program, (x,))
    torch.testing.assert_close(value[:, 0], torch.full_like(value[:, 0], 0.5), rtol=1e-14, atol=0)


def test_max_poolings_are_windows() -> None:
    assert set(MAX_POOLINGS) < {target for target, _ in _CASES}
