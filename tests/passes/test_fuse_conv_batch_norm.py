"""FuseConvBatchNorm: exact in real arithmetic, for every rank; refused where it isn't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt import FuseConvBatchNorm
from fxopt.capture import capture
from tests.check import check


def _settled(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics and weights of a trained one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 4, 9, 8)),
        (nn.Conv3d(2, 4, 2, dilation=2), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (3, 5)),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 3, 3)),
    ],
)
def test_every_rank_is_folded(
    convolution: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(convolution, _settled(norm), nn.ReLU()).eval()
    result = check(FuseConvBatchNorm(), model, (torch.randn(shape),), {"FoldBatchNorm": 1})
    assert not any("batch_norm" in str(node.target) for node in result.graph.nodes)


def test_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    check(FuseConvBatchNorm(), model.eval(), (torch.randn(2, 3, 5, 5),), 0)
    program = capture(model, (torch.randn(2, 3, 5, 5),))
    (refusal,) = FuseConvBatchNorm().plan(program).refusals
    assert "its statistics come from the batch" in refusal.reason


def test_a_norm_over_another_axis_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), _settled(nn.BatchNorm1d(4))).eval()
    result = check(FuseConvBatchNorm(), model, (torch.randn(3, 4, 5),), 0)
    assert "normalises another axis" in result.changes.refused[0].reason


def test_a_convolution_that_something_else_reads_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = _settled(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    result = check(FuseConvBatchNorm(), Shared().eval(), (torch.randn(2, 3, 4, 4),), 0)
    assert "is also used by" in result.changes.refused[0].reason


def test_a_weight_shared_by_two_convolutions_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = _settled(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.conv(x.relu())

    result = check(FuseConvBatchNorm(), Twice().eval(), (torch.randn(2, 3, 4, 4),), 0)
    assert "is shared with another layer" in result.changes.refused[0].reason
