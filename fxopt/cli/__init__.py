"""The command line: `fxopt optimize | inspect | bench | compare | search | passes`.

Exit codes: 0 done; 1 a claim failed, or a list couldn't be compared; 2 bad usage or input; 130
interrupted by Ctrl-C. What was measured until then is printed, and a second Ctrl-C leaves at once.
With --json the standard output holds one JSON document and nothing else, or nothing after an error;
progress goes to the standard error. Where something is to be written is tried before any work; if
writing fails all the same, what was found is printed before the error.
"""

from __future__ import annotations

import sys

import typer

from fxopt.cli.benching import bench
from fxopt.cli.comparing import compare
from fxopt.cli.inspecting import inspect
from fxopt.cli.listing import passes
from fxopt.cli.optimizing import optimize
from fxopt.cli.searching import search
from fxopt.errors import EquivalenceError, FxoptError

app = typer.Typer(
    name="fxopt",
    help="Make a PyTorch model cheaper to run, with every step shown to be equivalent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (optimize, inspect, bench, compare, search, passes):
    app.command()(_command)


def main() -> None:
    """Run the command line; the console script."""
    try:
        app()
    except EquivalenceError as error:
        typer.echo(f"claim failed: {error}", err=True)
        sys.exit(1)
    except FxoptError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
