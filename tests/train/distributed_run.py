"""What each process of test_distributed.py runs, all cases in one launch of torchrun.

python -m torch.distributed.run --nproc-per-node 2 -m tests.train.distributed_run FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from fxopt.errors import TrainError
from fxopt.train import Hidden, Logits, Task, distill
from tests.captured import trainable
from tests.train.models import bert, rows, text_batch

STATES = {"output_hidden_states": True}
TERMS = [Task(), Logits(), Hidden()]
ROWS = 16


def student(capture: bool = False, dropout: float = 0.0) -> Any:
    model = bert(1, 8, dropout, seed=1, **STATES)
    return trainable(model, {**text_batch(0), **STATES}) if capture else model


def train(one: nn.Module, data: Any, **options: Any) -> Any:
    """Two epochs with all terms and projections, on rows that all count the same."""
    given: dict[str, Any] = {
        "terms": TERMS, "epochs": 2, "optimizer": partial(torch.optim.SGD, lr=0.1), "accumulate": 2,
        "log_every": 2, **options,
    }  # fmt: skip
    return distill(one, bert(2, **STATES), data, **given)


def plain(one: nn.Module, folder: Path) -> Any:
    """Batches of 2 here and 2 there; the data's rows are shared out."""
    torch.manual_seed(dist.get_rank())  # what a rank drew before mustn't matter
    return train(one, DataLoader(rows(ROWS, padded=False), 2), evaluate=lambda student: {"one": 1})


def resumed(one: nn.Module, folder: Path) -> Any:
    """With dropout and shuffled rows: from the third step's checkpoint to the same weights."""

    def keep(line: str) -> None:
        if line.startswith("step 3: saved"):
            shutil.copy(folder / "run.pt", folder / "kept.pt")

    def run(student: nn.Module, path: Path) -> Any:
        data = DataLoader(rows(ROWS), 2, shuffle=True)
        return train(student, data, checkpoint=path, resume=True, save_every=1, progress=keep)

    whole = student(dropout=0.2)
    run(whole, folder / "run.pt")
    dist.barrier()
    result = run(one, folder / "kept.pt")
    wanted = whole.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in one.state_dict().items())
    assert result.resumed_at == 3
    return result


def interrupted(one: nn.Module, folder: Path) -> Any:
    """Rank 1 gets a SIGINT in its third step; both stop after the fourth, which is logged."""
    calls = 0

    def count(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 + 2 * 2 + 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)

    one.register_forward_pre_hook(count)
    try:
        train(
            one, DataLoader(rows(ROWS), 2), checkpoint=folder / "stopped.pt", epochs=3, log_every=4
        )
    except KeyboardInterrupt:
        return "interrupted"
    return "went on"


def sampled(one: nn.Module, folder: Path) -> Any:
    data = rows(ROWS, padded=False)
    return train(one, DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=False)))


def refused(one: nn.Module, folder: Path) -> Any:
    try:
        train(one, [text_batch(0), text_batch(1)])
    except TrainError as error:
        return str(error)
    return None


CASES = ("plain", "captured", "sampled", "resumed", "interrupted", "refused")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for case in CASES:
        one = student(capture=case == "captured", dropout=0.2 if case == "resumed" else 0.0)
        function: Any = globals()["plain" if case == "captured" else case]
        result = function(one, folder)
        saved: dict[str, Any] = {"student": one.state_dict()}
        if isinstance(result, str):
            saved["result"] = result
        else:
            saved["losses"] = result.history.losses
            saved["evaluations"] = len(result.history.evaluations)
        torch.save(saved, folder / f"{case}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
