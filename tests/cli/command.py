"""The command line run as a test wants it: in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fxopt.cli import app, main

SIZES = ["--batch", "2", "--length", "12"]


def run(*arguments: str, code: int = 0) -> Result:
    """The command in this process, which must exit with `code`."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that must fail before it prints anything."""
    monkeypatch.setattr(sys, "argv", ["fxopt", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert isinstance(caught.value.code, int)
    return caught.value.code, " ".join(captured.err.split())


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fxopt", *arguments], capture_output=True, text=True, check=False
    )
