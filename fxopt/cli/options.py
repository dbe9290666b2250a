"""The arguments and options that several commands share, with their types and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_PASSES = "canonicalize, fuse-linears, fuse-conv-batch-norm, prepack, lower"

Model = Annotated[
    str | None,
    typer.Argument(help="A local transformers folder or GGUF file; left out: the demo model."),
]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        "-p",
        help="Pass list, e.g. 'int8-linear{mode=dynamic}, lower'; auto: the recommended one.",
    ),
]
PassLists = Annotated[
    list[str] | None,
    typer.Option(
        "--passes",
        "-p",
        help="A pass list or auto, or NAME=LIST; give it several times.",
        show_default=DEFAULT_PASSES,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the example inputs.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per row, for text models.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds, in each of which all take turns.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text file, one text a line, from which passes learn ranges."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text file, one text a line, to judge on; left out: the example inputs alone."
    ),
]
Energy = Annotated[bool, typer.Option(help="Read joules where the hardware counts them.")]
Watts = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        help="Power of the processor at full load; energy is estimated where nothing counts it.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to the standard output.")]
