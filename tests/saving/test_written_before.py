"""Folders that an earlier version saved load, and answer what they answered there.

`written_before` was saved before tensors had origins: what passes made is told by suffixes of names
alone. Beside each folder are inputs and the outputs that the module gave.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fxopt

_FOLDERS = Path(__file__).parent / "written_before"


@pytest.mark.parametrize("name", ["branches", "int8", "pruned"])
def test_a_folder_of_before_loads(name: str, tmp_path: Path) -> None:
    calls = load_file(_FOLDERS / f"{name}.safetensors")
    opt = fxopt.load(_FOLDERS / name)
    opt.save(tmp_path / "again")
    for module in (opt, fxopt.load(tmp_path / "again")):
        for index in range(len(calls) // 2):
            got = module(calls[f"input.{index}"])
            torch.testing.assert_close(got, calls[f"output.{index}"])
    assert opt.report.steps
    assert len(opt.report.domains) == (2 if name == "branches" else 1)
