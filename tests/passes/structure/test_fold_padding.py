"""FoldPadding: zeros around a convolution's input become its own padding, where both sides have
as many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxopt import Canonicalize, FuseConvBatchNorm
from tests.check import check
from tests.rewriting.functions import operators


class Padded(nn.Module):
    """conv(pad(x))"""

    def __init__(self, conv: nn.Module, pad: tuple[int, ...], **how: Any) -> None:
        super().__init__()
        self.conv, self.pad, self.how = conv, pad, how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.pad(x, self.pad, **self.how))
        return y


@pytest.mark.parametrize(
    ("conv", "pad", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (2, 2), (2, 3, 7)),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), (1, 1, 2, 2), (2, 3, 7, 6)),
        (nn.Conv2d(4, 4, 3, padding=(0, 2), dilation=2, groups=4), (1, 1, 3, 3), (2, 4, 7, 6)),
        (nn.Conv2d(3, 4, 3, bias=False), (1, 1), (2, 3, 7, 6)),
        (nn.Conv3d(2, 3, 2), (1, 1, 0, 0, 2, 2), (2, 2, 4, 5, 6)),
    ],
)
def test_zeros_on_both_sides_move_into_the_convolution(
    conv: nn.Module, pad: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    result = check(
        FuseConvBatchNorm(), Padded(conv, pad).eval(), (torch.randn(shape),), {"FoldPadding": 1}
    )
    assert operators(result) == [f"conv{len(shape) - 2}d"]


@pytest.mark.parametrize(
    ("pad", "how", "reason"),
    [
        ((0, 1, 0, 1), {}, "it pads by [0, 1, 0, 1], on one side more"),
        ((1, 1, 1, 1), {"mode": "reflect"}, "it pads by 'reflect' with None, not by zeros"),
        ((1, 1, 1, 1), {"value": 2.0}, "it pads by 'constant' with 2.0, not by zeros"),
        ((-1, -1, 0, 0), {}, "a convolution takes fixed sizes from 0 on"),
        ((0, 0, 0, 0, 1, 1), {}, "it pads channels or the batch"),
    ],
)
def test_other_padding_is_refused(pad: tuple[int, ...], how: dict[str, Any], reason: str) -> None:
    channels = 5 if len(pad) == 6 else 3
    model = Padded(nn.Conv2d(channels, 4, 3), pad, **how).eval()
    result = check(FuseConvBatchNorm(), model, (torch.randn(2, 3, 7, 6),), 0)
    assert reason in result.changes.refused[0].reason


def test_padding_that_something_else_reads_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.pad(x, (1, 1, 1, 1))
            return self.conv(y) + y

    result = check(FuseConvBatchNorm(), Shared().eval(), (torch.randn(2, 3, 5, 5),), 0)
    assert "is also used by" in result.changes.refused[0].reason


def test_padding_by_nothing_is_dropped() -> None:
    model = Padded(nn.Conv2d(3, 4, 3), (0, 0, 0, 0)).eval()
    result = check(Canonicalize(), model, (torch.randn(2, 3, 7, 6),), {"DropIdentity": 1})
    assert operators(result) == ["conv2d"]
    check(Canonicalize(), Padded(nn.ReLU(), (1, -1)).eval(), (torch.randn(2, 3, 7),), 0)
