"""What is saved can be loaded: drawn networks of many shapes of blocks, in every mode."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxopt


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class C2f(nn.Module):
    """Halves of a convolution's channels, one of them convolved again; all concatenated."""

    def __init__(self, width: int, by_split: bool) -> None:
        super().__init__()
        self.by_split, self.half = by_split, width // 2
        self.first = ConvNorm(width, width)
        self.inner = ConvNorm(self.half, self.half, 3)
        self.last = ConvNorm(3 * self.half, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        parts = list(y.split(self.half, 1) if self.by_split else y.chunk(2, 1))
        return self.last(torch.cat([*parts, parts[-1] + self.inner(parts[-1])], 1))


class Pyramid(nn.Module):
    """Half the picture's size and back, in one of many ways, beside what came in."""

    def __init__(self, width: int, back: str) -> None:
        super().__init__()
        self.back = back
        self.down = ConvNorm(width, width, 3, 2)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.shuffled = nn.Conv2d(width, 4 * width, 1)
        self.join = ConvNorm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        if self.back == "transposed":
            y = self.up(y)
        elif self.back == "shuffled":
            y = functional.pixel_shuffle(self.shuffled(y), 2)
        elif self.back == "to size":
            y = functional.interpolate(y, size=x.shape[-2:], mode="nearest")
        else:
            y = functional.interpolate(y, scale_factor=2.0, mode=self.back)
        return self.join(torch.cat([x, y], 1))


class Padded(nn.Module):
    """A border, flattened axes and back, an average over all."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.mode, self.linear = mode, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(x, (1, 1, 1, 1), mode=self.mode)[:, :, 1:-1, 1:-1]
        tokens = self.linear(y.flatten(2).transpose(1, 2))
        y = tokens.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))
        return y + functional.adaptive_avg_pool2d(x, 1)


class Network(nn.Module):
    """Blocks between a stem and two heads."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = ConvNorm(3, width, 3), nn.Sequential(*blocks)
        self.heads = nn.ModuleList([nn.Conv2d(width, 5, 1), nn.Conv2d(width, 2, 3, padding=1)])

    def forward(self, image: Tensor) -> list[Tensor]:
        y = self.blocks(self.stem(image))
        return [head(y) for head in self.heads]


_WIDTH = 8
_BLOCKS: st.SearchStrategy[Callable[[], nn.Module]] = st.one_of(
    st.booleans().map(lambda split: lambda: C2f(_WIDTH, split)),
    st.sampled_from(["nearest", "bilinear", "bicubic", "transposed", "shuffled", "to size"]).map(
        lambda back: lambda: Pyramid(_WIDTH, back)
    ),
    st.sampled_from(["reflect", "replicate", "circular", "constant"]).map(
        lambda mode: lambda: Padded(_WIDTH, mode)
    ),
)
_PASSES = st.sampled_from(
    [["canonicalize"], ["prune-channels{ratio=0.3}"], ["canonicalize", "fuse-linears"]]
)


def assert_comes_back(opt: fxopt.Optimized, image: Tensor) -> None:
    """Saved and loaded, and pickled, `opt` computes the same and has the same symbols."""
    with tempfile.TemporaryDirectory() as folder:
        opt.save(Path(folder) / "saved")
        loaded = fxopt.load(Path(folder) / "saved")
    assert str(loaded.graph) == str(opt.graph)
    program = loaded.program
    for node, expected in zip(program.placeholders, program.signature.tensors, strict=True):
        assert tuple(map(str, node.meta["val"].shape)) == tuple(map(str, expected.sizes))
    twins = [loaded, pickle.loads(pickle.dumps(opt))]
    for size in (image, image[:1, :, 4:], image.tile(1, 1, 2, 1)):
        results = [twin(size) for twin in (*twins, opt)]
        for result in results[:-1]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[-1], strict=True))


def check(blocks: list[Callable[[], nn.Module]], passes: list[str], mode: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model, image = Network(_WIDTH, [make() for make in blocks]), torch.randn(2, 3, 8, 8)
    if mode == "eval":
        model.eval()
    opt = fxopt.transform(model, passes, example_inputs=(image,), mode=mode, on_violation="revert")
    if mode == "eval":
        assert_comes_back(opt, image)
        return
    optimizer = torch.optim.SGD(opt.parameters(), 0.01)
    sum(out.square().mean() for out in opt(image)).backward()
    optimizer.step()
    assert_comes_back(opt.eval(), image)
    assert_comes_back(opt.train(), image)


@settings(max_examples=6)
@given(
    st.lists(_BLOCKS, min_size=1, max_size=3),
    _PASSES,
    st.sampled_from(["eval", "train"]),
    st.integers(0, 99),
)
def test_every_network_comes_back(
    blocks: list[Callable[[], nn.Module]], passes: list[str], mode: Any, seed: int
) -> None:
    check(blocks, passes, mode, seed)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.lists(_BLOCKS, min_size=1, max_size=3),
    _PASSES,
    st.sampled_from(["eval", "train"]),
    st.integers(0, 99),
)
def test_many_networks_come_back(
    blocks: list[Callable[[], nn.Module]], passes: list[str], mode: Any, seed: int
) -> None:
    check(blocks, passes, mode, seed)


def test_a_detector_pruned_and_trained_comes_back() -> None:
    check(
        [lambda: C2f(8, False), lambda: Pyramid(8, "nearest")],
        ["prune-channels{ratio=0.3}"],
        "train",
        0,
    )


class Masked(nn.Module):
    """Rows by a mask, twice: two sizes that depend on values."""

    def forward(self, x: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return x[one] * 2, x[other].relu()


class Derived(nn.Module):
    """Inputs whose sizes are those of others, one longer and twice as long."""

    def forward(self, x: Tensor, longer: Tensor, double: Tensor) -> Tensor:
        return torch.cat([x, longer[:, 1:]], 1) + double


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (
            Masked(),
            (
                torch.randn(4, 3),
                torch.tensor([1, 0, 1, 1]).bool(),
                torch.tensor([0, 0, 0, 1]).bool(),
            ),
        ),
        (Derived(), (torch.randn(2, 5), torch.randn(2, 6), torch.randn(2, 10))),
        (nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), (torch.randn(2, 5, 3),)),
        (nn.GRU(3, 4), (torch.randn(2, 5, 3),)),
    ],
)
def test_other_programs_come_back(
    model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    opt = fxopt.transform(model.eval(), "canonicalize", example_inputs=inputs)
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert str(loaded.graph) == str(opt.graph)
    expected, got = (torch.utils._pytree.tree_leaves(each(*inputs)) for each in (opt, loaded))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
