"""Small models of every architecture that fxopt must take, each with inputs of several sizes.

Weights are random and seeded. Biases, norm weights and running statistics are random as well: where
they are zeros and ones, as a fresh model has them, a rewrite that drops one goes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Any]

_HIDDEN, _LAYERS, _HEADS, _FFN, _VOCAB, _POSITIONS = 32, 2, 4, 64, 97, 64
_TEXT_SIZES = ((2, 12), (3, 7), (1, 19))
_BATCH_SIZES = (2, 3, 1)


@dataclass(frozen=True)
class Case:
    """A model in eval mode, the inputs it is captured with, and inputs of other sizes."""

    model: nn.Module
    example: Inputs
    others: tuple[Inputs, ...]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill parameters and running statistics with seeded noise that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    center = 1.0 if name == "weight" else 0.0
                    parameter.copy_(center + 0.3 * noise(parameter))
                else:
                    fan_in = _fan_in(module, parameter)
                    parameter.copy_(noise(parameter) / fan_in**0.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(0.5 * noise(buffer))
                elif name == "running_var":
                    buffer.copy_(0.5 + noise(buffer).abs())
    return model.eval()


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return weight[0].numel()
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[-1]


def _tokens(batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCAB, (batch, length), generator=generator)
    lengths = torch.randint(max(1, length // 2), length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask}


def _text(model_class: type, config: Any, **extra: Callable[[int, int], Tensor]) -> Case:
    torch.manual_seed(0)
    model = randomize(model_class(config))
    inputs = []
    for seed, (batch, length) in enumerate(_TEXT_SIZES):
        made = {name: make(batch, length) for name, make in extra.items()}
        inputs.append({**_tokens(batch, length, seed), **made})
    return Case(model, inputs[0], tuple(inputs[1:]))


def _fixed_shape(model: nn.Module, name: str, shape: tuple[int, ...]) -> Case:
    """A model whose batch alone is free."""
    inputs = []
    for seed, batch in enumerate(_BATCH_SIZES):
        generator = torch.Generator().manual_seed(seed)
        inputs.append({name: torch.randn(batch, *shape, generator=generator)})
    return Case(randomize(model), inputs[0], tuple(inputs[1:]))


def _token_types(batch: int, length: int) -> Tensor:
    return (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()


_ENCODER = {
    "vocab_size": _VOCAB,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _FFN,
    "max_position_embeddings": _POSITIONS,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "use_cache": False}


def _bert() -> Case:
    config = transformers.BertConfig(**_ENCODER)
    return _text(transformers.BertModel, config, token_type_ids=_token_types)


def _bert_sequence() -> Case:
    config = transformers.BertConfig(**_ENCODER, num_labels=3)
    return _text(transformers.BertForSequenceClassification, config)


def _bert_token() -> Case:
    config = transformers.BertConfig(**_ENCODER, num_labels=5)
    return _text(transformers.BertForTokenClassification, config)


def _distilbert() -> Case:
    config = transformers.DistilBertConfig(
        vocab_size=_VOCAB,
        dim=_HIDDEN,
        n_layers=_LAYERS,
        n_heads=_HEADS,
        hidden_dim=_FFN,
        max_position_embeddings=_POSITIONS,
    )
    return _text(transformers.DistilBertModel, config)


def _roberta() -> Case:
    return _text(transformers.RobertaModel, transformers.RobertaConfig(**_ENCODER))


def _electra() -> Case:
    config = transformers.ElectraConfig(**_ENCODER, embedding_size=16)
    return _text(transformers.ElectraModel, config)


def _deberta_v2() -> Case:
    config = transformers.DebertaV2Config(
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    )
    return _text(transformers.DebertaV2Model, config)


def _gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=_VOCAB,
        n_embd=_HIDDEN,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_positions=_POSITIONS,
        use_cache=False,
    )
    return _text(transformers.GPT2LMHeadModel, config)


def _opt() -> Case:
    config = transformers.OPTConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        ffn_dim=_FFN,
        word_embed_proj_dim=_HIDDEN,
        max_position_embeddings=_POSITIONS,
        use_cache=False,
    )
    return _text(transformers.OPTForCausalLM, config)


def _llama() -> Case:
    return _text(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER))


def _qwen3() -> Case:
    config = transformers.Qwen3Config(**_DECODER, head_dim=16)
    return _text(transformers.Qwen3ForCausalLM, config)


def _gemma() -> Case:
    config = transformers.GemmaConfig(**_DECODER, head_dim=16)
    return _text(transformers.GemmaForCausalLM, config)


def _phi() -> Case:
    return _text(transformers.PhiForCausalLM, transformers.PhiConfig(**_DECODER))


def _mixtral() -> Case:
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    return _text(transformers.MixtralForCausalLM, config)


def _t5_encoder() -> Case:
    config = transformers.T5Config(
        vocab_size=_VOCAB,
        d_model=_HIDDEN,
        d_kv=8,
        d_ff=_FFN,
        num_layers=_LAYERS,
        num_heads=_HEADS,
        use_cache=False,
    )
    return _text(transformers.T5EncoderModel, config)


_VISION = {
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _FFN,
    "image_size": 16,
    "patch_size": 4,
}


def _vit() -> Case:
    model = transformers.ViTModel(transformers.ViTConfig(**_VISION))
    return _fixed_shape(model, "pixel_values", (3, 16, 16))


def _clip_text() -> Case:
    config = transformers.CLIPTextConfig(**_ENCODER, eos_token_id=2, bos_token_id=1)
    return _text(transformers.CLIPTextModel, config)


def _clip_vision() -> Case:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_VISION))
    return _fixed_shape(model, "pixel_values", (3, 16, 16))


def _whisper_encoder() -> Case:
    config = transformers.WhisperConfig(
        vocab_size=_VOCAB,
        d_model=_HIDDEN,
        encoder_layers=_LAYERS,
        decoder_layers=1,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=_FFN,
        decoder_ffn_dim=_FFN,
        max_source_positions=20,
        num_mel_bins=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    encoder = transformers.WhisperModel(config).get_encoder()
    return _fixed_shape(encoder, "input_features", (16, 40))


def _sequential() -> Case:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return _fixed_shape(model, "input", (8,))


class Mlp(nn.Module):
    """Two layers with dropout, which eval must not leave in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(nn.functional.gelu(self.up(x))))


class ResidualBlock(nn.Module):
    """conv, norm, relu, conv, norm around an identity, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + x)


class Cnn(nn.Module):
    """A stem, two residual blocks, global pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(image))))
        return self.head(x.mean((2, 3)))


class Stateful(nn.Module):
    """Writes two of its buffers on each call: a counter and a running mean."""

    calls: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls += 1
        self.average.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y - self.average


class SharedModule(nn.Module):
    """One linear module called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


class TiedWeights(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCAB, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, _VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embedding(ids))))


def _tied() -> Case:
    inputs = [{"ids": _tokens(b, n, i)["input_ids"]} for i, (b, n) in enumerate(_TEXT_SIZES)]
    return Case(randomize(TiedWeights()), inputs[0], tuple(inputs[1:]))


TRANSFORMERS: Mapping[str, Callable[[], Case]] = {
    "bert": _bert,
    "bert-sequence-classification": _bert_sequence,
    "bert-token-classification": _bert_token,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "electra": _electra,
    "deberta-v2": _deberta_v2,
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "phi": _phi,
    "mixtral": _mixtral,
    "t5-encoder": _t5_encoder,
    "vit": _vit,
    "clip-text": _clip_text,
    "clip-vision": _clip_vision,
    "whisper-encoder": _whisper_encoder,
}
PLAIN: Mapping[str, Callable[[], Case]] = {
    "sequential": _sequential,
    "mlp": lambda: _fixed_shape(Mlp(), "x", (8,)),
    "cnn": lambda: _fixed_shape(Cnn(), "image", (3, 16, 16)),
    "stateful": lambda: _fixed_shape(Stateful(), "x", (8,)),
    "shared-module": lambda: _fixed_shape(SharedModule(), "x", (8,)),
    "tied-weights": _tied,
}
ARCHITECTURES: Mapping[str, Callable[[], Case]] = {**TRANSFORMERS, **PLAIN}
