"""`python -m benchmarks page | regressions`: what is done with recorded results.

Exit codes: 0 done, 1 a regression beyond the noise, 2 bad usage or nothing to read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import regressions as comparing
from benchmarks.markdown import markdown
from benchmarks.page import page as render_page
from benchmarks.recorded import ResultsError, read_results

_RESULTS = Path(__file__).parent / "results"

app = typer.Typer(help="Recorded results: a page of them, and what got worse between two runs.")


@app.command()
def page(
    results: Annotated[
        Path, typer.Argument(help="Folder of results, or one file.", show_default=False)
    ] = _RESULTS,
    out: Annotated[Path | None, typer.Option(help="HTML file to write.")] = None,
) -> None:
    """Print the results as Markdown; with --out, write them as one HTML page too."""
    found = read_results(results)
    if out is not None:
        try:
            out.write_text(render_page(found), encoding="utf-8")
        except OSError as error:
            raise ResultsError(f"can't write {out}: {error.strerror}") from error
    typer.echo(markdown(found), nl=False)


@app.command()
def regressions(
    old: Annotated[Path, typer.Argument(help="Results of the run before: folder or file.")],
    new: Annotated[Path, typer.Argument(help="Results of the run after: folder or file.")],
) -> None:
    """Name what got worse from OLD to NEW beyond the noise; exit code 1 where something did."""
    found = comparing.differences(read_results(old), read_results(new))
    typer.echo(comparing.render(found))
    if any(difference.regressions for difference in found):
        raise typer.Exit(1)
    if all(difference.refusal for difference in found):
        raise ResultsError("no result could be compared, so that nothing is shown to be as before")


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ResultsError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
