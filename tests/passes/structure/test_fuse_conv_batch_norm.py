"""FuseConvBatchNorm: exact in real arithmetic, for every rank; refused where it isn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxopt
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


def test_a_norm_of_anything_else_says_what_it_normalises() -> None:
    model = nn.Sequential(nn.ReLU(), _settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 1)).eval()
    result = check(FuseConvBatchNorm(), model, (torch.randn(2, 3, 4, 4),), 0)
    (refusal,) = result.changes.refused
    assert refusal.reason == (
        "it normalises the result of relu, which is no convolution and no linear"
    )


class BasicBlock(nn.Module):
    """torchvision's, with its ReLU in place."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        relued: Tensor = self.relu(out)
        return relued


def resnet18() -> nn.Module:
    widths = (8, 16, 24, 32)
    blocks: list[nn.Module] = []
    for before, width in zip((8, *widths), widths, strict=False):
        stride = 1 if before == width else 2
        blocks += [BasicBlock(before, width, stride), BasicBlock(width, width, 1)]
    stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


class MBConv(nn.Module):
    """EfficientNet's block: expansion, depthwise convolution, squeeze and excitation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.SiLU(inplace=True),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inner, 4, 1),
            nn.SiLU(inplace=True),
            nn.Conv2d(4, inner, 1),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y *= self.squeeze(y)
        y = self.project(y)
        y += x
        result: Tensor = y
        return result


def efficientnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2, inplace=True)]
    blocks = [MBConv(8, 24) for _ in range(3)]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(8, 5))


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    return transformers.MobileNetV2ForImageClassification(config)


@pytest.mark.parametrize(("build", "moved"), [(resnet18, 0), (efficientnet, 0), (mobilenet, 47)])
def test_in_place_activations_hide_no_norm(build: Callable[[], nn.Module], moved: int) -> None:
    """Every batch norm is folded; what stays of a norm is in no graph."""
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        _settled(norm)
    opt = fxopt.transform(
        model.eval(),
        [FuseConvBatchNorm(), fxopt.Canonicalize()],
        example_inputs=(torch.randn(2, 3, 32, 32),),
    )
    fused = opt.report.steps[1]
    assert fused.fired["FoldBatchNorm"] == len(norms) == sum(fused.fired.values()) - moved
    text = "".join(str(step.graph) for step in opt.steps)
    assert "batch_norm" not in str(opt.graph)
    assert not any(word in text for word in ("native", "_legit", "addmm", "_scatter"))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    output = opt(x)
    if not isinstance(output, Tensor):
        output, expected = output.logits, expected.logits
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
