"""Names that a model may give its parts work everywhere, whatever Python makes of them."""

from __future__ import annotations

import keyword
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import InputError, ModelError

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)

NAMES = st.one_of(
    st.sampled_from(keyword.kwlist),
    st.sampled_from(["len", "torch", "self", "x", "__weird__", "a b", "1", "ﬁ", "é", "dtype"]),
    st.sampled_from(['a"b', "x'y", "\\", "a\nb", "{x}", '"), 1/0, ("', "a-b", "#", "%s"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1),
)


class Named(nn.Module):
    """A part, a parameter and a buffer of one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.parts = nn.ModuleDict()
        self.parts.add_module(name, nn.Linear(4, 4))
        self.values = nn.ParameterDict()
        self.values.register_parameter(name, nn.Parameter(torch.randn(4)))
        self.inner = nn.Module()
        self.inner.register_buffer(name, torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        part = self.parts._modules[self.name]
        assert part is not None
        result: Tensor = part(x) * self.values._parameters[self.name]
        return result + self.inner._buffers[self.name]


def usable(name: str) -> bool:
    """Whether torch itself lets a module hold something under that name."""
    return not any(hasattr(kind(), name) for kind in (nn.Module, nn.ModuleDict, nn.ParameterDict))


@settings(max_examples=15, deadline=None)
@given(NAMES.filter(usable))
@example("class")
def test_any_name_works_through_transform_and_saving(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    model = Named(name).eval()
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,))
    assert set(opt.state_dict()) == set(model.state_dict())
    assert torch.equal(opt(X), model(X))
    folder = tmp_path_factory.mktemp("names") / "saved"
    opt.save(folder)
    assert torch.equal(fxopt.load(folder)(X), model(X))


def test_odd_names_are_lowered_and_trained(tmp_path: Path) -> None:
    model = nn.Sequential(*(Named(name) for name in ("class", 'a"b\n', "ﬁ"))).eval()
    opt = fxopt.transform(model, "canonicalize,lower", example_inputs=(X,))
    assert torch.allclose(opt(X), model(X), atol=1e-5)
    opt.save(tmp_path / "saved")
    assert torch.allclose(fxopt.load(tmp_path / "saved")(X), model(X), atol=1e-5)
    trained = fxopt.transform(model, "canonicalize", example_inputs=(X,), mode="train")
    trained(X).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize("name", ["torch", "é", "slice", "len"])
def test_inputs_of_any_keyword(name: str) -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return x.relu()[:, 1:] + others[name].tanh()[:, 1:] * others["a_b"]

    model, inputs = Takes().eval(), {"x": X, name: X + 1, "a_b": X[:, 1:]}
    opt = fxopt.transform(model, "canonicalize", example_inputs=inputs)
    assert torch.equal(opt(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ["class", "1", "a-b"])
def test_inputs_under_what_is_no_name_are_refused(name: str) -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return x + others[name]

    with pytest.raises(InputError, match=f"'{name}' can't be the name of a captured argument"):
        fxopt.transform(Takes(), "canonicalize", example_inputs={"x": X, name: X})


def test_a_part_with_a_name_of_graph_modules_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("graph", nn.Linear(4, 4))
    with pytest.raises(ModelError, match="has a part named 'graph'"):
        fxopt.transform(model, "canonicalize", example_inputs=(X,))
