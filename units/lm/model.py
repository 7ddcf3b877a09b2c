"""The decoder-only transformer of the unit language model, in exactly Llama's arithmetic (Touvron et al.,
2023).

RMSNorm before each block, rotary positions on the two halves of a head (as Hugging Face stores them),
grouped-query attention, SwiGLU; biases on queries, keys and values as Qwen2 has them and a sliding window as
Mistral has it, where asked for. Parameter names are those of transformers' `LlamaForCausalLM` without their
`model.` in front.

Shapes: (batch, time, dim), attention (batch, time, heads, head_dim).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import Config
from pretrain.model.operations import dropout
from units.lm import cpu_kernels as kernels
from units.lm.attention import PackedDocuments, attend


class RopeScaling(Config):
    """Llama 3.1's longer context: slow rotations are slowed by `factor`, fast ones kept, those between
    interpolated ("llama3" in transformers)."""

    factor: float = Field(ge=1)
    low_freq_factor: float = Field(
        gt=0, description="rotations that turn fewer times than this in the original context are slowed"
    )
    high_freq_factor: float = Field(gt=0, description="rotations that turn more often than this are kept")
    original_max_position_embeddings: int = Field(ge=1, description="context before it was extended")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor "
                f"{self.low_freq_factor}"
            )
        return self


class DecoderConfig(Config):
    """Size of the decoder. Dropout acts on each block's output and on the embeddings, never inside the
    attention."""

    dim: int = Field(128, ge=2)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(
        2, ge=1, description="heads of keys and values, shared by num_heads / num_kv_heads queries each"
    )
    ffn_dim: int = Field(384, ge=1)
    context: int = Field(1024, ge=2, description="longest input in tokens")
    dropout: float = Field(0.1, ge=0, lt=1)
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = True
    qkv_bias: bool = Field(False, description="biases on queries, keys and values, as Qwen2")
    sliding_window: int | None = Field(
        None, ge=1, description="a token sees itself and this less one before it; None: all"
    )
    attention_dim: int | None = Field(None, ge=2, description="num_heads x head_dim where that is not dim")

    @property
    def head_dim(self) -> int:
        return (self.attention_dim or self.dim) // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> Self:
        name, width = (
            ("dim", self.dim) if self.attention_dim is None else ("attention_dim", self.attention_dim)
        )
        if width % (2 * self.num_heads):
            raise ValueError(f"{name} {width} must be an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self


class Decoder(nn.Module):
    """Tokens in, logits of the next token out.

    `vocabularies`: the number of symbols, or of each stream's symbols where a step has several (the levels of
    a codec). All streams share one table and one head, in which stream q's symbols follow those of stream q -
    1; a step's input is the sum of its streams' rows, and `split` cuts its logits into one vector per stream.
    """

    def __init__(self, config: DecoderConfig, vocabularies: int | Sequence[int]):
        super().__init__()
        self.config = config
        self.vocabularies = (vocabularies,) if isinstance(vocabularies, int) else tuple(vocabularies)
        self.vocabulary_size = vocabulary_size = sum(self.vocabularies)
        first = torch.tensor([0, *itertools.accumulate(self.vocabularies)], dtype=torch.int64)[:-1]
        self.offsets: Tensor  # (streams,), where each stream's rows begin
        self.register_buffer("offsets", first, persistent=False)
        self.embed_tokens = nn.Embedding(vocabulary_size, config.dim)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.dim, vocabulary_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: Tensor | PackedDocuments | None = None
    ) -> Tensor:
        """Logits (batch, time, vocabulary) from tokens (batch, time) or (batch, time, streams) and positions
        (batch, time); see `hidden`."""
        return self.logits(self.hidden(tokens, positions, documents))

    def hidden(
        self, tokens: Tensor, positions: Tensor, documents: Tensor | PackedDocuments | None = None
    ) -> Tensor:
        """States after the last norm, (batch, time, dim).

        With `documents` (batch, time), or the `PackedDocuments` of them, a token sees the tokens of its own
        document up to itself; without, all tokens up to itself. (units/lm/generation.py goes on from what was
        read before.)
        """
        config = self.config
        packing = PackedDocuments(documents) if isinstance(documents, Tensor) else documents
        x = dropout(self.embed(tokens), config.dropout, self.training)  # (batch, time, dim)
        if packing is not None:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            packing.choose(dtype, config.num_heads, config.head_dim, config.sliding_window)
        rotation = rotary_angles(positions, config)
        for layer in self.layers:
            x = layer(x, rotation, packing)
        normed: Tensor = self.norm(x)
        return normed

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, time, dim) from tokens (batch, time), or (batch, time, streams) whose rows are summed."""
        if tokens.ndim == 2:
            assert len(self.vocabularies) == 1
            rows: Tensor = self.embed_tokens(tokens)
            return rows
        return F.embedding(tokens + self.offsets, self.embed_tokens.weight).sum(2)

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits (..., vocabulary) as one view (..., size) per stream."""
        return logits.split(self.vocabularies, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(
            hidden, self.embed_tokens.weight if self.config.tied_embeddings else self.lm_head.weight
        )


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, float32 (batch, time, 1, head_dim / 2)."""

    cos: Tensor
    sin: Tensor


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU with residuals."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rotation: Rotation, packing: PackedDocuments | None) -> Tensor:
        if kernels.apply_here(x):
            return self._trained_here(x, rotation, packing)
        x = x + dropout(
            self.self_attn(self.input_layernorm(x), rotation, packing), self.dropout, self.training
        )
        return x + dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)

    def _trained_here(self, x: Tensor, rotation: Rotation, packing: PackedDocuments | None) -> Tensor:
        """The same by `units.lm.cpu_kernels`."""
        shape, attention, mlp = x.shape, self.self_attn, self.mlp
        plain = self.dropout == 0 or not self.training
        q, k, v, x = kernels.rotated_projections(
            x.flatten(0, 1),
            self.input_layernorm.weight,
            attention.norm_eps,
            torch.complex(rotation.cos, rotation.sin).view(-1, attention.head_dim // 2),
            attention.head_dim,
            (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias),
        )
        q, k, v = (part.unflatten(0, shape[:2]) for part in (q, k, v))
        # (tokens, heads x head_dim)
        attended = attend(q, k, v, packing, attention.window).flatten(2).flatten(0, 1)
        if plain:
            x = kernels.add_projected(x, attended, attention.o_proj.weight)
        else:
            x = x + dropout(attended @ attention.o_proj.weight.T, self.dropout, True)
        norm = self.post_attention_layernorm
        y = kernels.swiglu(
            x,
            norm.weight,
            attention.norm_eps,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            residual=plain,
        )
        return (y if plain else x + dropout(y, self.dropout, True)).view(shape)


class Attention(nn.Module):
    """Grouped-query attention with rotated queries and keys."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.window, self.norm_eps = config.sliding_window, config.norm_eps
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, packing: PackedDocuments | None) -> Tensor:
        v = self.v_proj(x).unflatten(2, (self.num_kv_heads, self.head_dim))
        q = rotate(self.q_proj(x).unflatten(2, (self.num_heads, self.head_dim)), rotation).to(v.dtype)
        k = rotate(self.k_proj(x).unflatten(2, (self.num_kv_heads, self.head_dim)), rotation).to(v.dtype)
        projected: Tensor = self.o_proj(attend(q, k, v, packing, self.window).flatten(2))
        return projected


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020)."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


def rotary_angles(positions: Tensor, config: DecoderConfig) -> Rotation:
    """Rotation by position / theta^(2i / head_dim), with the frequencies as `config.rope_scaling` changes
    them."""
    exponents = (
        torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    )
    frequencies = 1.0 / (config.rope_theta**exponents)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)  # 0: slowed wholly, 1: as before
        frequencies = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    angles = positions[:, :, None, None].float() * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding (Su et al., 2021): element i of a head turns together with element i +
    head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
