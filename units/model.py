"""The decoder-only transformer of the unit language model, in exactly Llama's arithmetic (Touvron et al., 2023).

RMSNorm before each block, rotary positions on the two halves of a head (as Hugging Face stores them), grouped-query attention,
SwiGLU, no biases. Parameter names are those of transformers' `LlamaForCausalLM` without their `model.` in front.

Shapes: (batch, time, dim), attention (batch, heads, time, head_dim).
"""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import Config


class DecoderConfig(Config):
    """Size of the decoder. Dropout acts on each block's output and on the embeddings, never inside the attention."""

    dim: int = Field(128, ge=2)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1, description="heads of keys and values, shared by num_heads / num_kv_heads queries each")
    ffn_dim: int = Field(384, ge=1)
    context: int = Field(1024, ge=2, description="longest input in tokens")
    dropout: float = Field(0.1, ge=0, lt=1)
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    tied_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class Cache:
    """Keys and values of the tokens read so far, for each layer: room for `capacity` tokens of `batch` sequences."""

    def __init__(self, decoder: "Decoder", batch: int, capacity: int):
        config, weight = decoder.config, decoder.embed_tokens.weight
        shape = (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
        self.entries = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0


class Decoder(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int):
        super().__init__()
        self.config, self.vocabulary_size = config, vocabulary_size
        self.embed_tokens = nn.Embedding(vocabulary_size, config.dim)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.dim, vocabulary_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (batch, time, vocabulary) from tokens and positions (batch, time); see `hidden`."""
        return self.logits(self.hidden(tokens, positions, documents, cache))

    def hidden(self, tokens: Tensor, positions: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """States after the last norm, (batch, time, dim).

        With `documents` (batch, time) a token sees the tokens of its own document up to itself; without, all tokens up to itself.
        With a `cache`, the tokens follow those it holds and are added to it: any number into an empty cache, then one at a time.
        """
        assert cache is None or (documents is None and (cache.length == 0 or tokens.shape[1] == 1))
        mask = None if documents is None else block_causal_mask(documents)
        rotation = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(self.embed_tokens(tokens))  # (batch, time, dim)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, None if cache is None else (cache.entries[number], cache.length))
        if cache is not None:
            cache.length += tokens.shape[1]
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight if self.config.tied_embeddings else self.lm_head.weight)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU with residuals."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, past: tuple[Tensor, int] | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, mask, past))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotated queries and keys, and a key-value cache when given one."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, past: tuple[Tensor, int] | None) -> Tensor:
        v = self._heads(self.v_proj(x), self.num_kv_heads)
        q = rotate(self._heads(self.q_proj(x), self.num_heads), rotation).to(v.dtype)
        k = rotate(self._heads(self.k_proj(x), self.num_kv_heads), rotation).to(v.dtype)
        if past is not None:
            entries, length = past
            entries[0, :, :, length : length + x.shape[1]] = k
            entries[1, :, :, length : length + x.shape[1]] = v
            k, v = entries[:, :, :, : length + x.shape[1]].to(q.dtype)
        causal = mask is None and x.shape[1] > 1  # a single token after a cache sees everything
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.num_heads != self.num_kv_heads
        )
        projected: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)


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


def block_causal_mask(documents: Tensor) -> Tensor:
    """(batch, 1, time, time) bool: True where query and key are of one document and the key is not later."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    time = documents.shape[1]
    return same & torch.ones(time, time, dtype=torch.bool, device=documents.device).tril()


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch, 1, time, head_dim) in float32 of position / theta^(2i / head_dim), both halves alike."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., 2021): element i of a head turns together with element i + head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
