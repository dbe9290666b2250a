"""A report made by hand: every kind of line once, no clock and no machine in it."""

from __future__ import annotations

import pytest

from fxopt.program import Refusal
from fxopt.report import GraphPicture, PictureNode, Report, Step
from fxopt.timing import Latency, Memory


def layer(number: int, feed: str, changed: bool) -> list[PictureNode]:
    """Two operations of one of several equal layers."""
    path, shape = f"encoder.layer.{number}", "float32[s0, 64]"
    weight = (f"{path}.dense.weight: float32[64, 64]",)
    linear = PictureNode(
        f"linear_{number}",
        "fxopt.int8_linear" if changed else "linear",
        f"{path}.dense",
        shape,
        (feed,),
        weights=weight,
        source="model.py:12  x = self.dense(x)",
        changed=changed,
    )
    add = PictureNode(f"add_{number}", "add", path, shape, (linear.name, feed))
    return [linear, add]


def draw_layers(count: int, changed: int) -> GraphPicture:
    """`count` equal layers, the first `changed` of them rewritten."""
    nodes = [PictureNode("x", "x", "", "float32[s0, 64]", (), kind="input")]
    for number in range(count):
        nodes += layer(number, nodes[-1].name, number < changed)
    nodes.append(PictureNode("output", "output", "", "", (nodes[-1].name,), kind="output"))
    modules = {"": "Tiny", "encoder": "Encoder"}
    modules |= {f"encoder.layer.{number}": "Layer" for number in range(count)}
    return GraphPicture("Tiny", tuple(nodes), modules, sizes=2)


STEPS = (
    Step(
        name="Canonicalize",
        spec="Canonicalize()",
        fired={"drop_no_op_cast": 12, "fold_constant": 2},
        refused=(),
        reverted=(),
        nodes_before=308,
        nodes_after=294,
        bytes_before=437_935_104,
        bytes_after=437_935_104,
        claim="exact",
        measured="largest difference 0.00e+00",
        holds=True,
        milliseconds=41.23,
    ),
    Step(
        name="FuseLinears",
        spec="FuseLinears()",
        fired={"fuse_linears": 0},
        refused=(
            Refusal("no other linear reads its input", "pooler.dense (linear_72)"),
            *(
                Refusal(
                    f"slower when fused here (M = 8, K = 384: 0.{9 - number}x)",
                    f"encoder.layer.{number}.output.dense (linear_{number})",
                )
                for number in range(4)
            ),
        ),
        reverted=(),
        nodes_before=294,
        nodes_after=294,
        bytes_before=437_935_104,
        bytes_after=437_935_104,
        claim="close",
        measured="",
        holds=True,
        milliseconds=850.0,
    ),
    Step(
        name="Int8Linear",
        spec="Int8Linear(mode='dynamic', include=('*',), exclude=(), smooth=None, budget_db=20.0)",
        fired={"int8_dynamic": 71},
        refused=tuple(
            Refusal("aten.linear: weight is tied to the embedding", node)
            for node in ("cls.predictions.decoder (linear_73)", "lm_head (linear_74)")
        ),
        reverted=(Refusal("claim failed here: 14.2 dB", "pooler.dense (linear_72)"),),
        nodes_before=294,
        nodes_after=436,
        bytes_before=437_935_104,
        bytes_after=181_400_000,
        claim="SQNR >= 20 dB",
        measured="38.2 dB",
        holds=True,
        milliseconds=8_120.0,
        warnings=("calibrated on 8 samples in 1 batch only (the first 8 x 16)",),
        details=(
            "layer                     alone     kept",
            "encoder.layer.0.dense     38.1 dB   int8",
            "encoder.layer.1.dense     14.2 dB   float32, since <int8> costs too much",
        ),
    ),
    Step(
        name="Lower",
        spec="Lower()",
        fired={},
        refused=(),
        reverted=(),
        nodes_before=436,
        nodes_after=436,
        bytes_before=181_400_000,
        bytes_after=181_400_000,
        claim="close",
        measured="relative error 2.00e-01 (allowed 0.0001)",
        holds=False,
        milliseconds=21_034.0,
        warnings=("kernel fxopt::int8_linear of node linear_3 isn't in the generated code",),
        graph="%linear_0 = aten.linear(%x)",
    ),
)


@pytest.fixture
def report() -> Report:
    return Report(
        model="Tiny",
        capture_ms=1234.0,
        steps=STEPS,
        end_to_end="SQNR >= 20 dB; measured 37.9 dB: holds",
        latency_before=Latency(148.1, 140.2, 171.0, 10, (148.1, 140.2, 171.0)),
        latency_after=Latency(64.04, 62.0, 70.9, 10),
        memory_before=Memory(52_000_000, "resident memory"),
        memory_after=Memory(31_000_000, "resident memory"),
        notes=("the model was captured in eval mode: dropout is off",),
        fingerprint={"cpu": "A CPU", "threads": 2, "gpu": None, "torch": "2.11.0"},
        picture_before=draw_layers(12, 0),
        picture_after=draw_layers(12, 4),
    )
