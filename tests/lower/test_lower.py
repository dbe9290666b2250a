import pytest
import torch
from torch import nn

import fxopt
from fxopt import LowerError, PassError
from fxopt.lower import Lower, compile_program
from fxopt.lower.compilation import Compiled
from fxopt.lower.generated import check_kernels, count_calls, kernel_nodes, missing_kernels
from fxopt.lower.toolchain import check_toolchain, explain_compiler_failure
from fxopt.nodes import label
from fxopt.optimized import graph_module

ops = torch.ops.fxopt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x))) + x


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * 2


def captured(model, x, passes="canonicalize"):
    program = fxopt.transform(model.eval(), passes, example_inputs=(x,)).program.materialized()
    return program, graph_module(program)


@pytest.fixture
def packed():
    x = torch.randn(3, 5, 8)
    program, module = captured(Model(), x, "prepack")
    return program, module, x


def lower(program, module, **options):
    return compile_program(module, program, Lower(**options))


def test_compiles_and_finds_every_kernel(packed):
    program, module, x = packed
    lines = []
    lowered = compile_program(module, program, Lower(strict=True), lines.append)
    assert lowered.kernels == {"fxopt.packed_linear": 2} == lowered.asked
    assert lowered.warnings == ()
    assert lowered.seconds > 0
    assert [line.split()[0] for line in lines[-2:]] == ["compiling", "compiled"]
    torch.testing.assert_close(lowered.callable(x), module(x))


def test_finds_kernels_on_a_hit_in_the_compilers_cache(packed):
    program, module, _ = packed
    first = lower(program, module)
    torch._dynamo.reset()
    again = lower(program, module)
    assert again.kernels == first.kernels
    assert again.warnings == ()


def test_other_shapes_compile_once_more_and_then_never(packed):
    program, module, _ = packed
    lowered = lower(program, module)
    for rows, length in ((4, 6), (5, 7), (2, 9), (8, 3)):
        x = torch.randn(rows, length, 8)
        torch.testing.assert_close(lowered.callable(x)[0], module(x)[0])
    assert len(lowered.callable.backend.codes) <= 3


def test_too_many_shapes_widen_instead_of_running_eagerly(packed):
    _, module, _ = packed
    compiled = Compiled(module, Lower(dynamic=False))
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (2, 3, 4, 5, 6):
            x = torch.randn(rows, 5, 8)
            torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert compiled._widened
    assert 3 <= len(compiled.backend.codes) <= 5


def test_endless_shapes_are_an_error_that_says_what_to_do(packed):
    _, module, _ = packed
    compiled = Compiled(module, Lower(dynamic=False))
    compiled._widened = True
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(torch.randn(2, 5, 8))
        with pytest.raises(LowerError, match="compiled for too many different inputs"):
            compiled(torch.randn(3, 5, 8))


def test_runs_in_the_grad_mode_it_was_made_in(packed):
    program, module, x = packed
    lowered = lower(program, module)
    assert not lowered.callable(x.requires_grad_())[0].requires_grad
    assert torch.is_grad_enabled()


def test_compiling_leaves_written_buffers_alone():
    program, module = captured(Counter(), torch.randn(3, 4))
    (calls,) = module.buffers()
    before = calls.item()
    lowered = lower(program, module)
    assert calls.item() == before
    lowered.callable(torch.randn(3, 4))
    assert calls.item() == before + 1


def test_no_process_wide_setting_changes(packed):
    import torch._functorch.config
    import torch._inductor.config

    configs = (torch._inductor.config, torch._functorch.config, torch._dynamo.config)
    before = [config.get_config_copy() for config in configs]
    program, module, _ = packed
    lower(program, module, mode="max-autotune")
    assert [config.get_config_copy() for config in configs] == before


def test_a_missing_kernel_is_named(packed):
    program, _, _ = packed
    asked = kernel_nodes(program.graph.nodes)
    code = (
        "buf0 = torch.ops.fxopt.packed_linear.default(x)\n# torch.ops.fxopt.packed_linear.default"
    )
    assert count_calls(code)["fxopt.packed_linear"] == 1
    in_cpp = (
        'auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fxopt::packed_linear", "");'
        '\n// findSchemaOrThrow("fxopt::packed_linear", "")'
        '\naoti_torch_call_dispatcher("fxopt::attention", "", dispatch_vars.data())'
    )
    assert count_calls(in_cpp) == {"fxopt.packed_linear": 1, "fxopt.attention": 1}
    (message,) = missing_kernels(asked, code)
    assert message.startswith(
        "1 of 2 calls of fxopt.packed_linear are in the generated code; asked for by "
    )
    for node in asked:
        assert f"{label(node)}: fxopt.packed_linear.default" in message
    with pytest.raises(LowerError, match=r"lowering lost kernels: 1 of 2 calls.*"):
        check_kernels(asked, code, strict=True)
    assert check_kernels(asked, code, strict=False) == (message,)


def test_equal_calls_are_asked_for_once():
    graph = torch.fx.Graph()
    q, w = graph.placeholder("q"), graph.get_attr("w")
    for _ in range(2):
        graph.call_function(ops.int8_product.default, (q, w))
    graph.call_function(ops.int8_product.default, (w, q))
    assert len(kernel_nodes(graph.nodes)) == 2


@pytest.mark.parametrize("fallback", [None, "eager"])
def test_no_cpp_compiler(packed, monkeypatch, fallback):
    program, module, x = packed
    monkeypatch.setattr("fxopt.lower.toolchain.has_cpp_compiler", lambda: False)
    if fallback is None:
        with pytest.raises(LowerError, match=r"C\+\+ compiler, and none was found; install one"):
            lower(program, module)
        return
    lowered = lower(program, module, fallback="eager")
    (warning,) = lowered.warnings
    assert warning.startswith("not compiled, runs eagerly: Inductor compiles for the CPU with")
    assert "Lower(fallback='eager')" in warning
    assert lowered.kernels == {}
    torch.testing.assert_close(lowered.callable(x)[0], module(x)[0])


def test_asks_for_a_compiler_that_is_not_there():
    from torch._inductor import config

    from fxopt.lower.toolchain import has_cpp_compiler

    assert has_cpp_compiler()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not has_cpp_compiler()


def test_a_compiler_that_fails_is_explained():
    from torch._inductor.exc import CppCompileError

    error = RuntimeError("outer")
    error.__cause__ = CppCompileError(["g++"], "x.cpp:1: fatal error: Python.h: No such file\nmore")
    explained = explain_compiler_failure(error)
    assert isinstance(explained, LowerError)
    assert "python3-dev" in str(explained)
    assert str(explained).endswith("x.cpp:1: fatal error: Python.h: No such file")
    plain = ValueError("something else")
    assert explain_compiler_failure(plain) is plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(LowerError, match="on cuda:0, and this machine has no CUDA device"):
        check_toolchain(torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"backend": "induktor"},
            "Lower(backend='induktor'): give 'inductor'; did you mean 'inductor'?",
        ),
        ({"mode": "max_autotune"}, "did you mean 'max-autotune'?"),
        ({"fallback": "Eager"}, "give one of 'eager', None; did you mean 'eager'?"),
        ({"dynamic": "yes"}, "Lower(dynamic='yes'): give True or False, or None"),
        ({"strict": "no"}, "Lower(strict='no'): give True or False"),
        ({"prepack": "no"}, "Lower(prepack='no'): give True or False"),
    ],
)
def test_wrong_options_name_the_nearest(options, text):
    with pytest.raises(PassError) as error:
        Lower(**options)
    assert text in str(error.value)


def test_plan_lists_the_kernels_and_apply_changes_nothing(packed):
    program, _, _ = packed
    plan = Lower().plan(program)
    assert len(plan.sites) == 2
    assert Lower().apply(program, plan) is program
    assert repr(Lower(mode="default", strict=True)) == "Lower(mode='default', strict=True)"
