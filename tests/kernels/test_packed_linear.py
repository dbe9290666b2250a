import copy
import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import PACKED_WEIGHTS, POST_OPS

pytestmark = pytest.mark.usefixtures("served_by")

packed_linear = torch.ops.fxopt.packed_linear
F = torch.nn.functional
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(5, 16), (1, 16), (0, 16), (16,), (2, 3, 17), (2, 1, 3, 7), (4, 1)]


@pytest.fixture(autouse=True)
def no_packed_weights():
    PACKED_WEIGHTS.clear()


def exact(x, weight, bias, post_op, other):
    z = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return z + other.double() if post_op == "add" else ACTIVATIONS[post_op](z)


def check(x, weight, bias, post_op, other=None):
    y = packed_linear(x, weight, bias, post_op, other)
    assert y.dtype == x.dtype
    expected = exact(x, weight, bias, post_op, other)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("post_op", sorted(POST_OPS))
def test_is_the_linear_and_its_post_operation(shape, dtype, post_op):
    x, weight = torch.randn(shape).to(dtype), (torch.randn(9, shape[-1]) / 4).to(dtype)
    other = torch.randn(*shape[:-1], 9).to(dtype) if post_op == "add" else None
    check(x, weight, torch.randn(9).to(dtype), post_op, other)
    check(x, weight, None, post_op, other)


@st.composite
def strided(draw):
    rows, inner, outputs = (draw(st.integers(0, 40)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(outputs, inner, generator=generator)
    bias = torch.randn(outputs, 2, generator=generator)[:, 0]
    other = torch.randn(outputs, rows, generator=generator).t()
    if draw(st.booleans()):
        x = x.t().contiguous().t()
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    return x, weight, bias, other


@given(strided(), st.sampled_from(sorted(POST_OPS)))
def test_strides_do_not_matter(drawn, post_op):
    x, weight, bias, other = drawn
    check(x, weight, bias, post_op, other if post_op == "add" else None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_and_infinity_are_not_hidden(bad):
    x = torch.ones(2, 4)
    x[0, 0] = bad
    y = packed_linear(x, torch.ones(3, 4), None, "gelu", None)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


def test_packs_once_for_all_aliases_of_a_weight():
    weight = torch.nn.Parameter(torch.randn(6, 5))
    x = torch.randn(3, 5)
    with torch.no_grad():
        for alias in (weight, weight.detach(), weight.data, weight):
            packed_linear(x, alias, None, "none", None)
    assert len(PACKED_WEIGHTS) == 1
    assert PACKED_WEIGHTS.nbytes >= 6 * 5 * 4


def test_a_view_is_another_weight_than_its_base():
    base = torch.randn(8, 8)
    x = torch.randn(3, 8)
    for weight in (base, base[:4], base[4:], base.t()):
        check(x, weight, None, "none")


def test_a_view_that_only_differs_in_strides_is_another_weight():
    weight = torch.zeros(32, 32)
    weight[1, 2] = 1.0
    for view in (weight, weight.t()):
        check(torch.randn(3, 32), view, None, "none")


def _add_in_place(weight):
    weight.add_(1.0)


def _swap_data(weight):
    weight.data = torch.randn(40, 30)


def _write_through_data(weight):
    weight.data.mul_(3.0)


def _load(weight):
    module = torch.nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": torch.randn(40, 30)})


def _resize_storage(weight):
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(40 * 30 * 4)
    weight.copy_(torch.randn(40, 30))


def _one_entry(weight):
    weight[3, 2] = 7.0


@pytest.mark.parametrize(
    "edit",
    [_add_in_place, _swap_data, _write_through_data, _load, _resize_storage, _one_entry],
)
def test_edits_of_the_weight_are_seen(edit):
    weight = torch.nn.Parameter(torch.randn(40, 30))
    x = torch.randn(3, 30)
    with torch.no_grad():
        check(x, weight, None, "none")
        edit(weight)
        check(x, weight, None, "none")


def test_an_optimizer_step_is_seen():
    weight = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    x = torch.randn(3, 5)
    packed_linear(x, weight, None, "none", None).square().sum().backward()
    optimizer.step()
    check(x, weight, None, "none")


def test_the_copy_dies_with_the_weight():
    weight = torch.randn(6, 5)
    packed_linear(torch.randn(3, 5), weight, None, "none", None)
    alias = weight[:]
    del weight
    gc.collect()
    assert len(PACKED_WEIGHTS) == 1
    del alias
    gc.collect()
    assert len(PACKED_WEIGHTS) == 0


def test_a_weight_at_the_address_of_a_dead_one_is_packed_anew():
    x = torch.randn(3, 5)
    for _ in range(50):
        check(x, torch.randn(6, 5), None, "none")
    gc.collect()
    assert len(PACKED_WEIGHTS) == 0


def test_deep_copies_have_their_own():
    weight = torch.randn(6, 5)
    x = torch.randn(3, 5)
    check(x, weight, None, "none")
    other = copy.deepcopy(weight).mul_(2.0)
    check(x, other, None, "none")
    check(x, weight, None, "none")


def test_threads_may_share_a_weight():
    weights = [torch.randn(32, 16) for _ in range(8)]
    x = torch.randn(4, 16)
    wrong = []

    def work():
        for weight in weights * 5:
            y = packed_linear(x, weight, None, "none", None)
            if not torch.allclose(y, F.linear(x, weight), atol=1e-4):
                wrong.append(weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(PACKED_WEIGHTS) == len(weights)


def test_inference_tensors_count_no_writes_and_are_not_packed():
    with torch.inference_mode():
        weight, x = torch.randn(6, 5), torch.randn(3, 5)
        check(x, weight, None, "relu")
        weight.mul_(2.0)
        check(x, weight, None, "relu")
    assert len(PACKED_WEIGHTS) == 0


@pytest.mark.parametrize("post_op", sorted(POST_OPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_linear(post_op, dtype):
    def run(function):
        torch.manual_seed(0)
        shapes = [(2, 3, 4), (5, 4), (5,), (2, 3, 5)]
        x, w, b, o = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        function(x, w, b, o).square().sum().backward()
        return [tensor.grad for tensor in (x, w, b, o)]

    def plain(x, w, b, o):
        z = F.linear(x, w, b)
        return z + o if post_op == "add" else ACTIVATIONS[post_op](z)

    adds = post_op == "add"
    got = run(lambda x, w, b, o: packed_linear(x, w, b, post_op, o if adds else None))
    for grad, expected in zip(got, run(plain), strict=True):
        if expected is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_wrong_inputs_say_what_is_needed():
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    for device in ("cpu", "meta"):
        x, weight = x.to(device), weight.to(device)
        with pytest.raises(KernelError, match="has no post_op 'tanh'; one of "):
            packed_linear(x, weight, None, "tanh", None)
        with pytest.raises(KernelError, match="takes `other` with post_op='add', and only then"):
            packed_linear(x, weight, None, "add", None)
        with pytest.raises(KernelError, match=r"needs \[..., K\] and a weight \[N, K\]"):
            packed_linear(x, weight.t(), None, "none", None)
        with pytest.raises(KernelError, match="adds an `other` of its result's shape"):
            packed_linear(x, weight, None, "add", x)
        with pytest.raises(KernelError, match="needs one dtype for all its tensors"):
            packed_linear(x, weight.double(), None, "none", None)


class PackedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x):
        h = packed_linear(x, self.first.weight, self.first.bias, "gelu", None)
        return packed_linear(h, self.second.weight, self.second.bias, "add", x).softmax(-1)


def test_survives_compile_export_and_state_dict():
    model = PackedModel().eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for shape in ((3, 5, 8), (2, 9, 8), (1, 1, 8)):
            y = torch.randn(shape)
            torch.testing.assert_close(compiled(y), model(y))
        assert len(PACKED_WEIGHTS) == 2
        model.load_state_dict({name: t * 2 for name, t in model.state_dict().items()})
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), expected)
        assert len(PACKED_WEIGHTS) == 2
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    module = torch.export.export(exported.module(), (x,), strict=False).module()
    torch.testing.assert_close(module(x), model(x))


def test_compiled_training_matches_eager():
    model = PackedModel()
    x = torch.randn(3, 5, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_operator_passes_the_schema_checks_of_torch():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    arguments = (x, weight, torch.randn(6), "gelu", None)
    torch.library.opcheck(torch.ops.fxopt.packed_linear.default, arguments)
