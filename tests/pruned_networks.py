"""Small convolutional networks, shaped like those whose channels people prune.

Each has what makes its family hard to cut: residual sums with a strided shortcut, concatenations
that grow, grouped and depthwise convolutions, squeeze and excitation, transposed convolutions and
skips, group norms. Statistics and biases are random, so that a dropped constant shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.architectures import Case, randomize

_CLASSES = 5
_IMAGE = (3, 32, 32)
_BATCH_SIZES = (2, 3, 1)


def _conv_norm(
    channels: int,
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out)]
    if act is not None:
        layers.append(act())
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity, or around a strided 1x1 one; as in ResNet-18."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels, out, 3, stride=stride)
        self.conv2 = _conv_norm(out, out, 3, act=None)
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity() if same else _conv_norm(channels, out, 1, stride=stride, act=None)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 in `groups`, 1x1; as in ResNet-50, and with groups as in ResNeXt."""

    def __init__(self, channels: int, width: int, out: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce = _conv_norm(channels, width, 1)
        self.middle = _conv_norm(width, width, 3, stride=stride, groups=groups)
        self.expand = _conv_norm(width, out, 1, act=None)
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity() if same else _conv_norm(channels, out, 1, stride=stride, act=None)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(self.middle(self.reduce(x))) + self.shortcut(x))


class Classifier(nn.Module):
    """A stem, blocks, global average pooling and a linear head."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], features: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(features, _CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(image))), 1))


def resnet() -> nn.Module:
    """Basic blocks, one of them strided, then bottlenecks."""
    stem = nn.Sequential(_conv_norm(3, 8, 7, stride=2), nn.MaxPool2d(3, 2, 1))
    blocks = [
        BasicBlock(8, 8, 1),
        BasicBlock(8, 16, 2),
        BasicBlock(16, 16, 1),
        Bottleneck(16, 8, 32, 2),
        Bottleneck(32, 8, 32, 1),
    ]
    return Classifier(stem, blocks, 32)


def resnext() -> nn.Module:
    """Bottlenecks whose 3x3 convolutions come in four groups."""
    stem = _conv_norm(3, 16, 3, stride=2)
    blocks = [Bottleneck(16, 16, 32, 1, 4), Bottleneck(32, 32, 32, 2, 4)]
    return Classifier(stem, blocks, 32)


class DenseLayer(nn.Module):
    """norm, relu, 1x1, norm, relu, 3x3; what comes out is put beside what came in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(2 * growth)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], dim=1)


def densenet() -> nn.Module:
    """Two dense stages with a halving transition between them, as in DenseNet-BC."""
    growth = 8
    transition = nn.Sequential(
        nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1, bias=False), nn.AvgPool2d(2)
    )
    blocks = [
        *(DenseLayer(16 + index * growth, growth) for index in range(3)),
        transition,
        *(DenseLayer(20 + index * growth, growth) for index in range(2)),
        nn.BatchNorm2d(36),
        nn.ReLU(),
    ]
    return Classifier(_conv_norm(3, 16, 3, stride=2), blocks, 36)


class SqueezeExcite(nn.Module):
    """Each channel times a gate that a small net computes of all channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.up(torch.relu(self.down(mean))))


class InvertedResidual(nn.Module):
    """1x1 that widens, depthwise 3x3, perhaps squeeze and excitation, 1x1 that narrows."""

    def __init__(
        self, channels: int, hidden: int, out: int, stride: int, act: type[nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        self.widen = _conv_norm(channels, hidden, 1, act=act)
        self.depthwise = _conv_norm(hidden, hidden, 3, stride=stride, groups=hidden, act=act)
        self.squeeze = SqueezeExcite(hidden, 8) if squeeze else nn.Identity()
        self.narrow = _conv_norm(hidden, out, 1, act=None)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.squeeze(self.depthwise(self.widen(x))))
        return x + y if self.residual else y


def _mobilenet(act: type[nn.Module], squeeze: bool) -> nn.Module:
    blocks = [
        InvertedResidual(8, 16, 8, 1, act, squeeze),
        InvertedResidual(8, 32, 16, 2, act, squeeze),
        InvertedResidual(16, 48, 16, 1, act, squeeze),
        _conv_norm(16, 32, 1, act=act),
    ]
    return Classifier(_conv_norm(3, 8, 3, stride=2, act=act), blocks, 32)


def mobilenet_v2() -> nn.Module:
    """Inverted residuals with depthwise convolutions and relu6."""
    return _mobilenet(nn.ReLU6, squeeze=False)


def mobilenet_v3() -> nn.Module:
    """Inverted residuals with hardswish and squeeze-and-excitation."""
    return _mobilenet(nn.Hardswish, squeeze=True)


def _double(channels: int, out: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    first, second = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
    return nn.Sequential(first, norm(out), nn.SiLU(), second, norm(out), nn.SiLU())


def _transposed(channels: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out, 2, stride=2)


def _resized(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, out, 3, padding=1))


class UNet(nn.Module):
    """Two levels down and up again; each level up sees what the same level down gave.

    `up` makes the layer that doubles the sides, `norm` the norm of that many channels.
    """

    def __init__(
        self, up: Callable[[int, int], nn.Module], norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, 8, norm), _double(8, 16, norm)
        self.pool = nn.MaxPool2d(2)
        self.bottom = _double(16, 32, norm)
        self.up2, self.up1 = up(32, 16), up(16, 8)
        self.level2, self.level1 = _double(32, 16, norm), _double(16, 8, norm)
        self.head = nn.Conv2d(8, _CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip1 = self.down1(image)
        skip2 = self.down2(self.pool(skip1))
        x = self.bottom(self.pool(skip2))
        x = self.level2(torch.cat([skip2, self.up2(x)], dim=1))
        return self.head(self.level1(torch.cat([skip1, self.up1(x)], dim=1)))


def unet() -> nn.Module:
    """Batch norms and transposed convolutions."""
    return UNet(_transposed, nn.BatchNorm2d)


def unet_group_norm() -> nn.Module:
    """Group norms and resized maps, as in diffusion models."""
    return UNet(_resized, lambda channels: nn.GroupNorm(4, channels))


def _case(build: Callable[[], nn.Module]) -> Case:
    torch.manual_seed(0)
    model = randomize(build())
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # Its stride is its kernel: each output sums over the input channels alone.
            drawn = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
            module.weight.data.copy_(drawn / module.in_channels**0.5)
    inputs = []
    for seed, batch in enumerate(_BATCH_SIZES):
        generator = torch.Generator().manual_seed(seed)
        inputs.append({"image": torch.randn(batch, *_IMAGE, generator=generator)})
    return Case(model, inputs[0], tuple(inputs[1:]))


_BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "resnext": resnext,
    "densenet": densenet,
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3": mobilenet_v3,
    "unet": unet,
    "unet-group-norm": unet_group_norm,
}
NETWORKS: Mapping[str, Callable[[], Case]] = {
    name: partial(_case, build) for name, build in _BUILDERS.items()
}
"""The networks as cases: in eval mode, captured with a batch of two images of 32 x 32."""
