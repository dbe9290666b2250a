"""SmolLM2-135M writes greedily: fxopt beside transformers, llama.cpp, OpenVINO, ONNX Runtime.

    python -m benchmarks.writing_peers --folder runs/writing --record

One process, the same prompt for all, real text. In each round every system writes once, after a
pause and a short text that isn't timed; the first round of each job isn't kept. A job `32x128` is a
prompt of 32 tokens and 128 that are written behind it. Read bandwidth is measured in every round,
so that what a step reads can be set against it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxopt
from benchmarks.models import Language, smollm2, smollm2_tokenizer
from benchmarks.sidebyside import spread, timing
from benchmarks.systems.runtime_writers import RUNTIMES
from benchmarks.systems.torch_writers import OURS, TORCH_PEERS
from benchmarks.systems.writing import Source, Writer, WritingSystem
from fxopt.timing import Latency, fingerprint, ratio, summarize

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SYSTEMS: tuple[WritingSystem, ...] = (*OURS, *TORCH_PEERS, *RUNTIMES)
_OURS = frozenset(system.name for system in OURS)
_REFERENCE = "transformers fp32"
_RESULTS = Path(__file__).parent / "results"
_NAME = "smollm2_writing_beside_peers"
_SWEPT = 512 << 20
"""Bytes that are read to find the bandwidth, many times the caches."""
# Longer than the thread pools of OpenMP, TBB and ONNX Runtime spin after a call.
_PAUSE_SECONDS = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """`new` tokens behind a prompt of `prompt`."""

    prompt: int
    new: int

    @staticmethod
    def read(text: str) -> Job:
        """Of `32x128`; raises `ValueError` for anything else."""
        prompt, _, new = text.partition("x")
        job = Job(int(prompt), int(new))
        if job.prompt < 1 or job.new < 2:
            raise ValueError(f"{text}: a prompt has 1 token or more, and 2 or more are written")
        return job

    def __str__(self) -> str:
        return f"{self.prompt}x{self.new}"


@dataclass
class Samples:
    """Milliseconds by system, a sample a round."""

    first: dict[str, list[float]] = field(default_factory=dict)
    step: dict[str, list[float]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)


def chosen(only: Sequence[str], without: Sequence[str]) -> list[WritingSystem]:
    """The systems whose names fit a glob of `only`; without one, all that aren't slow."""
    return [
        system
        for system in SYSTEMS
        if (any(fnmatchcase(system.name, glob) for glob in only) if only else not system.slow)
        and not any(fnmatchcase(system.name, glob) for glob in without)
    ]


def prepared(
    systems: Sequence[WritingSystem], source: Source, say: Say
) -> tuple[dict[str, Writer], dict[str, str]]:
    """The writers by name, and why others are left out."""
    writers: dict[str, Writer] = {}
    skipped: dict[str, str] = {}
    for system in systems:
        if system.missing:
            skipped[system.name] = f"needs {', '.join(system.missing)}"
            continue
        started = time.perf_counter()
        try:
            writers[system.name] = system.prepare(source)
        except Exception as error:  # a peer's code raises whatever it stumbles over
            skipped[system.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            say(f"{system.name} is left out: {skipped[system.name]}")
            continue
        say(f"{system.name}: ready after {time.perf_counter() - started:.0f} s")
    return writers, skipped


def measured(
    writers: Mapping[str, Writer], job: Job, text: Sequence[int], rounds: int, whole: bool
) -> Samples:
    """Every writer once a round, in turns; a first round isn't kept."""
    found = Samples()
    prompt = list(text[: job.prompt])
    for number in range(rounds + 1):
        for name, writer in writers.items():
            time.sleep(_PAUSE_SECONDS)
            writer.write(prompt[:8], 2)
            written = writer.write(prompt, job.new)
            generate = getattr(writer, "generate", None) if whole and name in _OURS else None
            took = None if generate is None else generate(prompt, job.new)
            if not number:
                told = getattr(writer, "tokens", None)
                found.tokens[name] = told(prompt, job.new) if told else written.tokens
                continue
            found.first.setdefault(name, []).append(written.first_ms)
            found.step.setdefault(name, []).append(written.step_ms)
            if took is not None:
                found.whole.setdefault(name, []).append(took)
    return found


def read_bandwidth(sweeps: int) -> Latency:
    """GB/s at which torch's threads read, over so many sweeps."""
    memory = torch.ones(_SWEPT // 4, dtype=torch.int32)
    rates = []
    for _ in range(sweeps):
        started = time.perf_counter()
        memory.amax()
        rates.append(_SWEPT / (time.perf_counter() - started) / 1e9)
    return summarize(rates)


def equal_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def figures_of(
    writers: Mapping[str, Writer], jobs: Mapping[Job, Samples], bandwidth: Latency
) -> dict[str, Any]:
    """What is recorded: the first job in each system's row, the others beside it."""
    (first, samples), *others = jobs.items()
    wanted = samples.tokens.get(_REFERENCE)
    systems: dict[str, dict[str, Any]] = {}
    for name, writer in writers.items():
        step = summarize(samples.step[name])
        row = {
            **timing(step),
            "tokens_per_second": round(1e3 / step.median, 1),
            "first_token_ms": round(summarize(samples.first[name]).median, 2),
        }
        if wanted is not None:
            row["tokens_of_the_original"] = equal_beginning(samples.tokens[name], wanted)
        if name in samples.whole:
            whole = summarize(samples.whole[name]).median
            steps = summarize(samples.first[name]).median + (first.new - 1) * step.median
            row["generate_over_steps"] = round(whole / steps, 3)
        if writer.weight_bytes is not None:
            rate = writer.weight_bytes / step.median / 1e6
            row["weight_megabytes"] = round(writer.weight_bytes / 1e6, 1)
            row["share_of_read_bandwidth"] = round(rate / bandwidth.median, 3)
        for job, more in others:
            row[f"step_ms_behind_{job.prompt}"] = round(summarize(more.step[name]).median, 3)
            row[f"first_token_ms_of_{job.prompt}"] = round(summarize(more.first[name]).median, 2)
        systems[name] = {**row, "settings": writer.settings}
    return {
        "model": "SmolLM2-135M-Instruct",
        "jobs": [str(job) for job in jobs],
        "read_gigabytes_per_second": spread(bandwidth),
        "systems": systems,
        "ratios": _ratios(writers, jobs),
    }


def _ratios(writers: Mapping[str, Writer], jobs: Mapping[Job, Samples]) -> dict[str, Any]:
    """The steps of each of ours over those of each peer, round by round, in every job."""
    found = {}
    for index, (job, samples) in enumerate(jobs.items()):
        suffix = f" behind {job.prompt}" if index else ""
        times = {name: summarize(samples.step[name]) for name in writers}
        for ours in (name for name in writers if name in _OURS):
            for peer in (name for name in writers if name not in _OURS):
                pair = f"{ours}{suffix} / {peer}{suffix}"
                found[pair] = spread(ratio(times[ours], times[peer]))
    return found


def perplexities(
    writers: Mapping[str, Writer], windows: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Of the systems that give logits, over windows [1, T] that are each read at once."""
    found = {}
    for name, writer in writers.items():
        logits = getattr(writer, "logits", None)
        if logits is None:
            continue
        losses = [
            torch.nn.functional.cross_entropy(logits(window)[0, :-1], window[0, 1:])
            for window in windows
        ]
        found[name] = round(float(torch.stack(losses).mean().exp()), 4)
    return found


def _table(figures: Mapping[str, Any]) -> str:
    """One line a system, the fastest first."""
    rows = sorted(figures["systems"].items(), key=lambda item: item[1]["median_ms"])
    lines = [f"{'step, ms':>26}{'tokens/s':>24}{'equal':>7}{'of bandwidth':>14}"]
    for name, row in rows:
        lines.append(
            f"{name:<28}{row['median_ms']:8.2f} ({row['p5_ms']:.2f} to {row['p95_ms']:.2f})"
            f"{row['tokens_per_second']:9.1f}{row.get('tokens_of_the_original', ''):>7}"
            f"{row.get('share_of_read_bandwidth', ''):>14}"
        )
    return "\n".join(lines)


def _language(quick: bool, longest: int, windows: int) -> tuple[Language, Any]:
    language = smollm2(max(longest, 512), quick=quick, judged=max(1, windows))
    return language, None if quick else smollm2_tokenizer()


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where files made of the model are kept.")] = Path(
        "runs/writing"
    ),
    jobs: Annotated[str, typer.Option(help="Prompts x new tokens, the first is compared.")] = (
        "32x128,1024x16"
    ),
    rounds: Annotated[int, typer.Option(min=3, help="Kept rounds of each job.")] = 3,
    only: Annotated[str, typer.Option(help="Globs of systems; left out: all but slow ones.")] = "",
    without: Annotated[str, typer.Option(help="Globs of systems that are left out.")] = "",
    whole: Annotated[bool, typer.Option(help="Time the `generate` of ours too.")] = True,
    perplexity: Annotated[int, typer.Option(min=0, help="Windows of 512 tokens to judge on.")] = 0,
    prepare: Annotated[bool, typer.Option(help="Make the files, and measure nothing.")] = False,
    record: Annotated[bool, typer.Option(help="Write benchmarks/results.")] = False,
    quick: Annotated[bool, typer.Option(help="A tiny model, without runtimes.")] = False,
) -> None:
    """Write with each system in turns; a table, and with --record a result."""
    if quick and record:
        raise typer.BadParameter("--quick measures nothing worth keeping: leave out --record")
    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        asked = [Job.read(text) for text in jobs.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--jobs: {error}") from error
    systems = chosen(_globs(only), _globs(without))
    if quick:
        systems = [system for system in systems if system not in RUNTIMES]
    language, tokenizer = _language(quick, max(job.prompt for job in asked), perplexity)
    source = Source(language.model, tokenizer, folder.resolve())
    writers, skipped = prepared(systems, source, console.print)
    if prepare or not writers:
        return
    text = language.evaluation[0][0].tolist()
    bandwidth = [*read_bandwidth(5).samples]
    found = {}
    for job in asked:
        console.print(f"writing {job}")
        found[job] = measured(writers, job, text, rounds, whole and job is asked[0])
        bandwidth += read_bandwidth(5).samples
    figures = {**figures_of(writers, found, summarize(bandwidth)), "left_out": skipped}
    if perplexity:
        console.print("judging")
        for name, value in perplexities(writers, [w[:, :512] for w in language.evaluation]).items():
            figures["systems"][name]["perplexity"] = value
    typer.echo(_table(figures))
    if record:
        machine = {**fingerprint(), "fxopt": fxopt.__version__}
        document = json.dumps({"machine": machine, **figures}, indent=2)
        _RESULTS.joinpath(f"{_NAME}.json").write_text(f"{document}\n", encoding="utf-8")


def _globs(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    app()
