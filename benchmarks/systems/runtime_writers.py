"""Runtimes of their own that write: llama.cpp, OpenVINO GenAI, ONNX Runtime GenAI.

llama.cpp comes as the prebuilt wheel `xllamacpp`, whose server counts its own milliseconds; its
kernels are those that the wheel was built for, which `settings` says. OpenVINO reads the same GGUF
files. ONNX Runtime's model builder rounds the expanded weights.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems.gguf_files import PACKAGE, STORED, rewritten, stored_file, weight_bytes
from benchmarks.systems.writing import Source, Writer, WritingSystem, Written

_LONGEST = 2048
"""Slots of a llama.cpp context: the longest prompt that is measured, and what is written."""


class LlamaCpp:
    """The server of llama.cpp in this process, one text at a time."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = _LONGEST, 1
        params.n_batch = params.n_ubatch = 512
        for part in ("cpuparams", "cpuparams_batch"):
            getattr(params, part).n_threads = torch.get_num_threads()
        params.warmup, params.verbosity = True, -1
        self.server = xllamacpp.Server(params)
        self.weight_bytes = weight_bytes(file)
        flags = xllamacpp.get_system_info().replace(" = 1", "").replace(" | ", " ")
        self.settings = f"xllamacpp {_version('xllamacpp')}, f16 cache, {flags.strip()}"

    def write(self, prompt: Sequence[int], new: int) -> Written:
        times = self._answer(prompt, new)["timings"]
        return Written((), times["prompt_ms"], times["predicted_ms"] / (times["predicted_n"] - 1))

    def tokens(self, prompt: Sequence[int], new: int) -> tuple[int, ...]:
        """The tokens alone, which the server tells where it is asked for their chances."""
        answer = self._answer(prompt, new, logprobs=1)
        return tuple(one["id"] for one in answer["choices"][0]["logprobs"]["content"])

    def _answer(self, prompt: Sequence[int], new: int, **more: Any) -> Any:
        return self.server.handle_completions(
            {
                "prompt": list(prompt),
                "n_predict": new,
                "temperature": 0.0,
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": False,
                "ignore_eos": True,
                "stream": False,
                **more,
            }
        )


class OpenVINO:
    """OpenVINO GenAI's pipeline over a GGUF file, with its own metrics."""

    def __init__(self, file: Path, **options: Any) -> None:
        import openvino_genai

        threads = torch.get_num_threads()
        self.pipeline = openvino_genai.LLMPipeline(
            str(file), "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY", **options
        )
        self.weight_bytes = weight_bytes(file)
        self.settings = f"openvino-genai {_version('openvino-genai')}, {file.stem}, latency hint"

    def write(self, prompt: Sequence[int], new: int) -> Written:
        import numpy
        import openvino
        import openvino_genai

        ids = numpy.array([prompt], dtype=numpy.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids))
        )
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample, config.eos_token_id = True, False, 2
        answer = self.pipeline.generate(inputs, config)
        metrics = answer.perf_metrics
        tokens = tuple(int(token) for token in answer.tokens[0])
        return Written(tokens, metrics.get_ttft().mean, metrics.get_tpot().mean)


class OnnxRuntime:
    """ONNX Runtime GenAI over a folder that its model builder made."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self.model = onnxruntime_genai.Model(str(folder))
        self.weight_bytes = (folder / "model.onnx.data").stat().st_size
        version = _version("onnxruntime-genai")
        self.settings = (
            f"onnxruntime-genai {version}, {folder.name}, blocks of 32, accuracy level 4"
        )

    def write(self, prompt: Sequence[int], new: int) -> Written:
        import onnxruntime_genai

        length = len(prompt) + new
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self.model, params)
        stamps = [time.perf_counter()]
        generator.append_tokens(list(prompt))
        for _ in range(new):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
        tokens = tuple(int(one) for one in generator.get_sequence(0)[len(prompt) :])
        step = (stamps[-1] - stamps[1]) / (new - 1)
        return Written(tokens, 1e3 * (stamps[1] - stamps[0]), 1e3 * step)


def gguf_of(source: Source, weights: str) -> Path:
    """The file with weights of a type, made where it isn't there."""
    if weights == STORED:
        return stored_file()
    target = source.folder / f"smollm2-{weights}.gguf"
    if not target.exists():
        made = rewritten(stored_file(), target.with_suffix(".part"), weights)
        made.rename(target)
    return target


def _llamacpp(weights: str) -> WritingSystem:
    return WritingSystem(
        f"llama.cpp {weights}",
        lambda source: LlamaCpp(gguf_of(source, weights)),
        ("xllamacpp", "gguf", PACKAGE),
    )


def _openvino(weights: str) -> WritingSystem:
    return WritingSystem(
        f"OpenVINO GenAI {weights}",
        lambda source: OpenVINO(gguf_of(source, weights)),
        ("openvino_genai", "gguf", PACKAGE),
    )


def _onnxruntime(precision: str) -> Callable[[Source], Writer]:
    def prepare(source: Source) -> Writer:
        folder = source.folder / f"onnxruntime-{precision}"
        if not (folder / "genai_config.json").exists():
            _build(_checkpoint(source), folder, precision)
        config_file = folder / "genai_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        session = config["model"]["decoder"]["session_options"]
        session["intra_op_num_threads"] = torch.get_num_threads()
        config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
        return OnnxRuntime(folder)

    return prepare


def _checkpoint(source: Source) -> Path:
    """The model as a folder of transformers; one read from a GGUF file can't be saved itself."""
    folder = source.folder / "checkpoint"
    if not (folder / "config.json").exists():
        config = source.model.config.to_dict()
        config.pop("quantization_config", None)
        model = type(source.model)(type(source.model.config)(**config))
        model.load_state_dict(source.model.state_dict())
        source.tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _build(checkpoint: Path, folder: Path, precision: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", checkpoint, "-o", folder, "-p", precision, "-e", "cpu"]
    command = [*builder, *map(str, options), "--extra_options", "accuracy_level=4"]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(f"{folder}.log", "wb"))  # noqa: PTH123
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )


def _version(package: str) -> str:
    return importlib.metadata.version(package)


RUNTIMES = (
    *(_llamacpp(weights) for weights in ("F32", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M")),
    *(_openvino(weights) for weights in ("Q8_0", "Q4_0", "Q4_1")),
    *(
        WritingSystem(
            f"ONNX Runtime GenAI {precision}", _onnxruntime(precision), ("onnxruntime_genai",)
        )
        for precision in ("int8", "int4")
    ),
)
