"""fxopt::cached_attention: new positions to a prefix and to themselves, whoever computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from fxopt.analyses.arithmetic import multiply_adds
from fxopt.analyses.channels import channels
from fxopt.analyses.precision.operators import operator_precision
from fxopt.capture import capture
from fxopt.errors import KernelError
from fxopt.interpreter import evaluate
from fxopt.kernels import cached_attention as kernel
from fxopt.lower.generated import count_calls
from tests.rewriting.functions import calls, program_of

pytestmark = pytest.mark.usefixtures("decoded_by")

cached_attention = torch.ops.fxopt.cached_attention
ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}


@dataclass(frozen=True)
class Case:
    """The arguments of one call; all floats of one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    past_k: Tensor
    past_v: Tensor
    past_seen: Tensor
    seen: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def call(self) -> Tensor:
        return cached_attention(*self.arguments())  # type: ignore[no-any-return]


def one_by_one(case: Case) -> Tensor:
    """The definition, one query of one head at a time, in float64."""
    batch, heads, queries, _ = case.q.shape
    past = case.past_k.shape[2]
    keys, values = (
        torch.cat(pair, 2).double() for pair in ((case.past_k, case.k), (case.past_v, case.v))
    )
    tokens = torch.cat((case.past_seen, case.seen), 1).tolist()
    output = torch.zeros(batch, queries, heads, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // keys.shape[1])
            for i in range(queries):
                visible = [
                    j
                    for j in range(past + i + 1)
                    if tokens[b][j] and (case.window is None or past + i - j < case.window)
                ]
                scores = [
                    case.scale * float(case.q[b, h, i].double() @ keys[b, group, j])
                    for j in visible
                ]
                if case.softcap is not None:
                    scores = [case.softcap * math.tanh(s / case.softcap) for s in scores]
                sink = [] if case.sinks is None else [float(case.sinks[h])]
                top = max(scores + sink, default=0.0)
                total = sum(math.exp(s - top) for s in scores + sink)
                for s, j in zip(scores, visible, strict=True):
                    output[b, i, h] += math.exp(s - top) / total * values[b, group, j]
    return output


def check(case: Case) -> None:
    got, expected = case.call(), one_by_one(case)
    assert got.dtype == case.q.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    error = ERROR[got.dtype] * (1.0 + float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=error)


def prefix(batch: int, groups: int, length: int, size: int, room: int) -> Tensor:
    """The filled part of a buffer with `room` more positions, which hold what must not be read."""
    buffer = torch.full((batch, groups, length + room, size), math.nan)
    buffer[:, :, :length] = torch.randn(batch, groups, length, size)
    return buffer


@st.composite
def cases(draw: st.DrawFn, most: int = 20) -> Case:
    batch, groups, each = (draw(st.integers(1, 3)) for _ in range(3))
    queries = draw(st.sampled_from([1, 1, 2, 8]) | st.integers(1, most))
    past = draw(st.sampled_from([0, 1]) | st.integers(0, most))
    size, value_size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(list(ERROR)))
    room = draw(st.sampled_from([0, 5]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(batch, queries, groups * each, size).transpose(1, 2)
    k = torch.randn(batch, queries, groups, size).transpose(1, 2)
    v = torch.randn(batch, groups, queries, value_size)
    buffers = (prefix(batch, groups, past, n, room).to(dtype) for n in (size, value_size))
    past_k, past_v = (buffer[:, :, :past] for buffer in buffers)
    past_seen, seen = _tokens(draw(st.sampled_from(PADDING)), batch, past, queries)
    window = draw(st.none() | st.integers(1, past + queries + 2))
    softcap = draw(st.none() | st.sampled_from([0.7, 30.0]))
    sinks = torch.randn(groups * each).to(dtype) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([size**-0.5, 1.0, -0.3]))
    rows = (t.to(dtype) for t in (q, k, v))
    return Case(*rows, past_k, past_v, past_seen, seen, scale, window, softcap, sinks)


PADDING = ("none", "none", "left", "anywhere", "a row", "all")


def _tokens(kind: str, batch: int, past: int, queries: int) -> tuple[Tensor, Tensor]:
    slots = past + queries
    tokens = torch.ones(batch, slots, dtype=torch.bool)
    if kind == "left":
        tokens = torch.arange(slots) >= torch.randint(0, slots + 1, (batch, 1))
    elif kind == "anywhere":
        tokens = torch.rand(batch, slots) < 0.6
    elif kind == "a row":
        tokens[0] = False
    elif kind == "all":
        tokens[:] = False
    return tokens[:, :past], tokens[:, past:]


@settings(max_examples=200)
@given(cases())
def test_is_the_definition(case: Case) -> None:
    check(case)


@st.composite
def long_cases(draw: st.DrawFn) -> Case:
    """Prefixes of several blocks and runs, heads that share a key head in every number of rows."""
    batch, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    each = draw(st.sampled_from([1, 3, 4, 7, 8, 40]))
    queries = draw(st.sampled_from([1, 1, 2, 9, 70]))
    past = draw(st.sampled_from([0, 63, 64, 65, 300, 900]))
    size, value_size = (draw(st.sampled_from([16, 64, 80, 37])) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(batch, groups * each, queries, size)
    k, past_k = torch.randn(batch, groups, past + queries, size).split((queries, past), 2)
    v, past_v = torch.randn(batch, groups, past + queries, value_size).split((queries, past), 2)
    # Scores that grow along the prefix, so that the largest comes up late.
    past_k = past_k * torch.linspace(0.1, draw(st.sampled_from([1.0, 6.0])), past)[:, None]
    past_seen, seen = _tokens(draw(st.sampled_from(PADDING)), batch, past, queries)
    window = draw(st.none() | st.sampled_from([1, 50, 64, 400]))
    softcap, sinks = draw(st.none() | st.just(5.0)), draw(st.booleans())
    logits = torch.randn(groups * each).to(dtype) if sinks else None
    rows = (t.to(dtype) for t in (q, k, v, past_k, past_v))
    return Case(*rows, past_seen, seen, size**-0.5, window, softcap, logits)


@pytest.mark.usefixtures("threads")
@settings(max_examples=60)
@given(long_cases())
def test_long_prefixes_are_the_definition(case: Case) -> None:
    """The definition in aten, in float64; it is the definition one query at a time, see below."""
    exact = {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in vars(case).items()
    }
    expected = kernel.cached_attention(**exact)
    got = case.call()
    assert got.dtype == case.q.dtype
    assert got.is_contiguous()
    error = ERROR[got.dtype] * (1.0 + float(expected.abs().max()))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=error)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("where", ["k", "past_k", "q", "v"])
def test_not_a_number_reaches_the_result(where: str) -> None:
    for queries in (1, 12):
        case = plain(300, queries)
        spoilt = getattr(case, where).clone()
        spoilt[:, :, 0] = math.nan
        got = replace(case, **{where: spoilt}).call()
        assert bool(got[:, 0].isnan().all())


def plain(past: int = 5, queries: int = 3, heads: int = 4, groups: int = 2) -> Case:
    torch.manual_seed(past)
    q, k, v = (torch.randn(2, n, queries, 8) for n in (heads, groups, groups))
    past_k, past_v = (torch.randn(2, groups, past, 8) for _ in range(2))
    past_seen, seen = (torch.ones(2, n, dtype=torch.bool) for n in (past, queries))
    return Case(q, k, v, past_k, past_v, past_seen, seen, 0.3)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 2, 8])
def test_the_definition_in_aten_is_the_definition(
    past: int, queries: int, groups: int, window: int | None
) -> None:
    case = replace(plain(past, queries, 4, groups), window=window)
    got = kernel.cached_attention(*case.arguments())
    torch.testing.assert_close(got.double(), one_by_one(case), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.call(), got)


def test_steps_are_the_whole() -> None:
    whole = plain(0, 7)
    expected = whole.call()
    for i in range(7):
        step = Case(
            *(t[:, :, i : i + 1] for t in (whole.q, whole.k, whole.v)),
            *(t[:, :, :i] for t in (whole.k, whole.v)),
            *(whole.seen[:, :i], whole.seen[:, i : i + 1]),
            whole.scale,
        )
        torch.testing.assert_close(step.call()[:, 0], expected[:, i])


def test_a_call_without_queries_or_values_is_empty() -> None:
    assert plain(5, 0).call().shape == (2, 0, 4, 8)
    assert plain(0, 0).call().shape == (2, 0, 4, 8)
    case = plain()
    assert replace(case, v=case.v[..., :0], past_v=case.past_v[..., :0]).call().numel() == 0


@pytest.mark.parametrize("fault", ["scale", "window", "seen", "heads"])
def test_faults_would_be_caught(fault: str) -> None:
    case = replace(plain(), window=4)
    wrong = {
        "scale": replace(case, scale=0.31),
        "window": replace(case, window=5),
        "seen": replace(case, past_seen=case.past_seen & (torch.arange(5) != 3)),
        "heads": replace(case, past_k=case.past_k.flip(1)),
    }[fault]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(wrong.call().double(), one_by_one(case), rtol=0, atol=1e-4)


class Layer(nn.Module):
    """One attention layer of `transformers`, its keys and values handed in and out."""

    def __init__(self, attention: nn.Module, window: int | None) -> None:
        super().__init__()
        self.attention, self.window = attention, window

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_seen: Tensor,
        seen: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer, shape = self.attention, (*x.shape[:-1], -1, 8)
        q, k, v = (
            getattr(layer, f"{n}_proj")(x).view(shape).transpose(1, 2) for n in ("q", "k", "v")
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        softcap = getattr(layer, "attn_logit_softcapping", None)
        rows = (past_k, past_v, past_seen, seen, layer.scaling, self.window, softcap)
        y = cached_attention(q, k, v, *rows)
        return layer.o_proj(y.flatten(2)), k, v


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "intermediate_size": 8,
}


def layer_of(name: str, implementation: str) -> tuple[nn.Module, Any, int | None]:
    torch.manual_seed(0)
    if name == "llama":
        config: Any = LlamaConfig(**SIZES)
        config._attn_implementation = implementation
        attention: Any = modeling_llama.LlamaAttention(config, 0)
        return attention.eval(), modeling_llama.LlamaRotaryEmbedding(config), None
    config = Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=8)
    config._attn_implementation = implementation
    attention = modeling_gemma2.Gemma2Attention(config, 0)
    # Scores that the cap bends, at random weights.
    attention.attn_logit_softcapping = 0.5
    return attention.eval(), modeling_gemma2.Gemma2RotaryEmbedding(config), 6


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")]
)
def test_is_a_layer_of_transformers(name: str, implementation: str, padding: int) -> None:
    attention, rotary, window = layer_of(name, implementation)
    x, tokens = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)
    tokens[0, :padding] = False
    position = (tokens.long().cumsum(1) - 1).clamp_min(0)
    cos, sin = rotary(x, position)
    behind = torch.arange(12)[:, None] - torch.arange(12)
    near = (behind >= 0) & (behind < (window or 99))
    visible = tokens[:, None, None] & near
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~visible, torch.finfo().min)
    with torch.no_grad():
        expected, _ = attention(x, (cos, sin), mask)
        layer, at = Layer(attention, window), 0
        past = torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8)
        for until in (7, 8, 12):
            part = slice(at, until)
            rows = (x[:, part], cos[:, part], sin[:, part])
            y, k, v = layer(*rows, *past, tokens[:, :at], tokens[:, part])
            held = tokens[:, part]
            torch.testing.assert_close(y[held], expected[:, part][held], rtol=1e-4, atol=1e-5)
            past, at = (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)), until


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return (case.q, case.k, case.v, case.past_k, case.past_v, case.past_seen, case.seen)


class Attention(nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return cached_attention(*inputs, 0.3, 6), inputs[1]


def test_sizes_that_must_be_equal_become_relations_of_the_signature() -> None:
    program = capture(Attention(), inputs_of(plain()))
    sizes = [tuple(map(str, i.sizes)) for i in program.signature.tensors]
    q, k, v, past_k, past_v, past_seen, seen = sizes
    assert {sizes[0] for sizes in (q, k, v, past_k, past_v, past_seen, seen)} == {q[0]}
    assert {q[2], k[2], v[2], seen[1]} == {q[2]}
    assert {past_k[2], past_v[2], past_seen[1]} == {past_k[2]}
    assert len({q[0], q[2], past_k[2]}) == 3
    for past, queries in ((5, 3), (9, 2)):
        inputs = inputs_of(plain(past, queries))
        torch.testing.assert_close(evaluate(program, inputs), list(Attention()(*inputs)))


def test_survives_compile_at_any_length() -> None:
    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True)
    for past, queries in ((5, 3), (9, 2), (0, 4)):
        inputs = inputs_of(plain(past, queries))
        torch.testing.assert_close(compiled(*inputs)[0], Attention()(*inputs)[0])
    assert count_calls("torch.ops.fxopt.cached_attention.default(x)") == {
        "fxopt.cached_attention": 1
    }


def test_what_is_said_of_it() -> None:
    program = program_of(lambda *inputs: cached_attention(*inputs, 0.3), *inputs_of(plain()))
    (node,) = calls(program, cached_attention.default)
    assert multiply_adds(program) == {node.name: 2 * 4 * 3 * 8 * (5 + 3) * 2}
    precision = operator_precision(node)
    assert precision.side == "high"
    assert precision.always
    assert precision.reason.startswith("it reads what earlier calls computed")


def test_channels_go_through_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.o = nn.Linear(16, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
            q, k, *rest = inputs
            v = self.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
            return self.o(cached_attention(q, k, v, *rest, 0.3).flatten(2))

    case = plain()
    q, k, _, *rest = inputs_of(case)
    program = capture(Model(), (torch.randn(2, 3, 16), q, k, *rest))
    groups = {group.name: group for group in channels(program).groups}
    assert {name: group.size for name, group in groups.items()} == {
        "v.heads": 2,
        "v.head_dim": 8,
        "v.channels": 16,
        "o.channels": 16,
        "o.queries": 2,
    }
    for name in ("v.heads", "v.head_dim", "o.queries"):
        # The prefix comes from outside, with heads and channels that nobody may cut.
        reasons = {refusal.reason for refusal in groups[name].refusals}
        assert reasons == {"an input of the model has it"}


def test_operator_passes_the_schema_checks_of_torch() -> None:
    case = replace(plain(), window=4, softcap=3.0, sinks=torch.randn(4))
    torch.library.opcheck(cached_attention.default, case.arguments())
    floats = {
        n: t for n, t in vars(case).items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    learned = replace(case, **{n: t.requires_grad_() for n, t in floats.items()})
    torch.library.opcheck(cached_attention.default, learned.arguments())


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_are_those_of_the_definition(sinks: bool) -> None:
    def run(function: Any) -> list[Tensor | None]:
        case = plain()
        leaves = [t.requires_grad_() for t in inputs_of(case)[:5]]
        logits = torch.ones(4, requires_grad=True) if sinks else None
        rest = (case.past_seen, case.seen, 0.3, 4, None, logits)
        function(*leaves, *rest).square().sum().backward()
        return [leaf.grad for leaf in leaves] + ([logits.grad] if logits is not None else [])

    torch.testing.assert_close(run(cached_attention), run(kernel.cached_attention))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(2, 3)}, "needs q [B, H, S, D], not (2, 3)"),
        (
            {"past_k": torch.ones(2, 2, 5, 7)},
            "needs past_k [B, G, P, D], not (2, 2, 5, 7): D is 8 in q",
        ),
        ({"past_v": torch.ones(2, 2, 4, 8)}, "not (2, 2, 4, 8): P is 5 in past_k"),
        ({"seen": torch.ones(2, 4).bool()}, "needs seen [B, S], not (2, 4): S is 3 in q"),
        ({"past_seen": torch.ones(1, 5).bool()}, "not (1, 5): B is 2 in q"),
        ({"sinks": torch.ones(3)}, "needs sinks [H], not (3,): H is 4 in q"),
        ({"seen": torch.ones(2, 3)}, "needs seen of torch.bool, not torch.float32"),
        (
            {"past_k": torch.ones(2, 2, 5, 8).half()},
            "of one float dtype and float sinks; past_k is torch.float16, q torch.float32",
        ),
        ({"q": torch.ones(2, 3, 3, 8)}, "heads of q among those of k: 3 are no multiple of 2"),
        ({"window": 0}, "needs a window of 1 position or more, not 0"),
        ({"softcap": 0.0}, "needs a softcap above 0, not 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_inputs_say_what_is_needed(changed: dict[str, Any], message: str) -> None:
    case = replace(plain(), **changed)
    with pytest.raises(KernelError) as caught:
        case.call()
    assert f"cached_attention {message}" in str(caught.value) or message in str(caught.value)
    tensors = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in vars(case).items()}
    with pytest.raises(KernelError):
        Case(**tensors).call()
