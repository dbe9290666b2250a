"""Two processes that train together are one that sees both their batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fxopt.train import distill
from tests.train import distributed_run
from tests.train.models import Rows, rows

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left what they made of all cases."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.train.distributed_run", str(folder)),
    ]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


def ranks_of(case: str, folder: Path) -> list[dict[str, Any]]:
    """What each of the two ranks saved."""
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_weights(ranks: list[dict[str, Any]]) -> None:
    for name, tensor in ranks[0]["student"].items():
        assert torch.equal(tensor, ranks[1]["student"][name]), name


@pytest.mark.parametrize("case", ["plain", "captured", "sampled"])
def test_two_processes_end_as_one_with_the_doubled_batch(folder: Path, case: str) -> None:
    """A step of two processes, 2 accumulated batches of 2 rows each, sees the rows of one process
    with 2 batches of 4, since rank r gets rows r, r + 2, ... of the data in order."""
    ranks = ranks_of(case, folder)
    assert_same_weights(ranks)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    alone = distributed_run.student()
    data = DataLoader(rows(distributed_run.ROWS, padded=False), 4)
    history = distributed_run.train(alone, data).history
    assert ranks[0]["losses"]["total"] == pytest.approx(history.losses["total"], rel=1e-5)
    for name, tensor in ranks[0]["student"].items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_two_processes_resume_to_the_same_weights(folder: Path) -> None:
    assert_same_weights(ranks_of("resumed", folder))


def test_an_interrupt_of_one_stops_both_at_the_same_step(folder: Path) -> None:
    ranks = ranks_of("interrupted", folder)
    assert [rank["result"] for rank in ranks] == ["interrupted", "interrupted"]
    assert_same_weights(ranks)
    state = torch.load(folder / "stopped.pt", weights_only=True)
    assert state["position"]["step"] == 4
    assert len(state["draws"]) == 2
    assert torch.equal(state["student"]["classifier.bias"], ranks[0]["student"]["classifier.bias"])


def test_data_that_cannot_be_shared_out_are_refused(folder: Path) -> None:
    for rank in ranks_of("refused", folder):
        assert rank["result"] == (
            "2 processes train, and data= (a list) can't be shared out among them. Give a Dataset "
            "with batch_size=, a plain DataLoader over one, or a DataLoader with a "
            "DistributedSampler"
        )


def test_one_process_of_a_group_may_train_alone() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        results = []
        for distributed in (None, True, False):
            one = distributed_run.student()
            distill(
                one, distributed_run.bert(2), Rows(rows(8).batch), batch_size=4,
                terms=[distributed_run.Logits()], distributed=distributed,
            )  # fmt: skip
            results.append(one.state_dict())
        for other in results[1:]:
            assert all(torch.equal(one, other[name]) for name, one in results[0].items())
    finally:
        torch.distributed.destroy_process_group()
