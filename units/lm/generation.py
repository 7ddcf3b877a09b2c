"""The decoder in the form that draws sequences: one step at a time, for a batch, with keys and values kept.

`units.lm.model.Decoder` is made for training; a step of a single token through it is bound by the number of
operations and by the bytes of its weights. Here the products of queries, keys and values are one, those of
gate and up are one, norms' weights and the attention's scale are multiplied into the matrices, rotary pairs
lie side by side (so that turning them is one complex product), and the weights are stored as the fastest
kernel for few rows takes them. In float32 that is the same arithmetic, in another order.

Prompts of different lengths are aligned at their ends, so that all rows of a batch write the same slot of the
cache; what lies before a shorter one's beginning is masked, and positions count from each row's own
beginning.

Shapes: tokens (batch, time) or (batch, time, streams), keys and values (batch, kv_heads, slot, head_dim).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from units.corpus.patterns import Pattern
from units.lm.model import Decoder, rotary_angles

Precision = Literal["float32", "bfloat16", "int8"]
# x (rows, in), scale (rows, 1) -> W x scale (rows, out); float32 where scaled
Product = Callable[[Tensor, Tensor | None], Tensor]


class Reading:
    """What a batch has read: keys and values by layer, room for `capacity` steps, and where each row
    begins."""

    def __init__(self, model: "CompactDecoder", lengths: Tensor, longest: int, capacity: int):
        config, batch, device = model.config, len(lengths), model.device
        self.length, self.starts = 0, longest - lengths  # (batch,): the slot of each row's BOS
        shape = (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
        self.entries = torch.empty(shape, dtype=model.cache_dtype, device=device)
        flat = self.entries.view(config.num_layers, 2, batch * config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = (
            flat[:, 0].transpose(2, 3),
            flat[:, 1],
        )  # (layers, batch x kv_heads, head_dim, slot) and (.., slot, head_dim)
        self.slots = self.entries.transpose(1, 2)  # (layers, batch, 2, kv_heads, slot, head_dim)
        slots = torch.arange(capacity, device=device)
        self.positions = (slots - self.starts[:, None]).clamp(min=0)  # (batch, slot)
        self.rotation = model.rotation(self.positions)  # (batch, slot, 1, head_dim / 2) complex
        self.ragged = bool(self.starts.any())
        hidden = slots < self.starts[:, None]  # (batch, slot)
        bias = torch.zeros(hidden.shape, dtype=model.cache_dtype, device=device).masked_fill_(
            hidden, -torch.inf
        )
        self.bias = bias.repeat_interleave(config.num_kv_heads, 0)[:, None]  # (batch x kv_heads, 1, slot)


class CompactDecoder:
    """A trained decoder for generation; the decoder itself is left as it is.

    `precision`: of the matrix products. "bfloat16" rounds weights and inputs. "int8", on a CPU only, has
    weights of 8 bits, scaled by output channel; inputs are bfloat16 where there is one row, and 8 bits scaled
    by row where there are more. `window`: how many tokens each sees at most, itself the last of them, if the
    decoder's own window is not smaller.
    """

    def __init__(self, decoder: Decoder, precision: Precision = "float32", window: int | None = None):
        self.config, self.vocabularies, self.offsets = decoder.config, decoder.vocabularies, decoder.offsets
        self.precision, self.device = precision, decoder.embed_tokens.weight.device
        if precision == "int8" and self.device.type != "cpu":
            raise ValueError(f'precision: "int8" runs on a CPU, not on {self.device}; "bfloat16" is for GPUs')
        config = self.config
        self.window = min(
            [size for size in (window, config.sliding_window) if size is not None], default=None
        )
        self.cache_dtype = (
            torch.bfloat16 if precision == "bfloat16" and self.device.type == "cuda" else torch.float32
        )
        weights = {name: weight.float() for name, weight in decoder.state_dict().items()}
        self.table = weights["embed_tokens.weight"]
        self.epsilon = torch.tensor([[config.norm_eps]], device=self.device)
        self.halves = [config.ffn_dim, config.ffn_dim]
        self.query_size, self.key_size = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )
        self.layers: list[tuple[Product, Tensor | None, Product, Product, Product]] = []
        for number in range(config.num_layers):
            own = {
                name.split(".", 2)[2]: weight
                for name, weight in weights.items()
                if name.startswith(f"layers.{number}.")
            }
            qkv, bias = self._joined_qkv(own)
            gate_up = torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])
            self.layers.append(
                (
                    self._product(qkv * own["input_layernorm.weight"]),
                    bias,
                    self._product(own["self_attn.o_proj.weight"]),
                    self._product(gate_up * own["post_attention_layernorm.weight"]),
                    self._product(own["mlp.down_proj.weight"]),
                )
            )
        head = weights["embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"]
        self.head = self._product(head * weights["norm.weight"])

    def _joined_qkv(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(query + 2 x key size, dim), the heads' halves interleaved in queries and keys, and the bias if the
        projections have one."""
        half = self.config.head_dim // 2
        # 0, half, 1, half + 1, ...
        pairs = torch.arange(self.config.head_dim, device=self.device).view(2, half).T.flatten()
        parts: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for name, scale in (("q_proj", self.config.head_dim**-0.5), ("k_proj", 1.0), ("v_proj", 1.0)):
            for kind, into in parts.items():
                if (tensor := weights.get(f"self_attn.{name}.{kind}")) is not None:
                    heads = tensor.view(-1, self.config.head_dim, *tensor.shape[1:]) * scale
                    into.append((heads if name == "v_proj" else heads[:, pairs]).flatten(0, 1))
        return torch.cat(parts["weight"]), torch.cat(parts["bias"]) if parts["bias"] else None

    def _product(self, weight: Tensor) -> Product:
        if self.precision == "int8":
            return Int8Product(weight)
        if self.precision == "bfloat16":
            return bfloat16_product(weight)
        transposed = weight.T.contiguous()  # for few rows much faster than (out, in) with MKL
        return lambda x, scale: (
            torch.mm(x, transposed) if scale is None else torch.mm(x, transposed).mul_(scale)
        )

    def rotation(self, positions: Tensor) -> Tensor:
        """Complex numbers of modulus 1 that turn the pairs of a head: (batch, time, 1, head_dim / 2)."""
        return torch.complex(*rotary_angles(positions, self.config))

    @torch.inference_mode()
    def begin(self, prefixes: Sequence[np.ndarray], room: int) -> tuple[Reading, Tensor]:
        """Read the beginnings int64 (time,) or (time, streams), of any lengths; `room`: for how many steps
        more.

        Returns what was read and float32 logits of the next step (batch, vocabulary), of all streams.
        """
        reading, hidden = self._read(prefixes, room)
        return reading, self._logits(hidden[:, -1])

    @torch.inference_mode()
    def step(self, reading: Reading, tokens: Tensor) -> Tensor:
        """Read one more symbol of each row, int64 (batch,) or (batch, streams): float32 logits (batch,
        vocabulary)."""
        config, at = self.config, reading.length
        x = (
            F.embedding(tokens, self.table)
            if tokens.ndim == 1
            else F.embedding(tokens + self.offsets, self.table).sum(1)
        )
        batch, first = len(x), 0 if self.window is None else max(0, at + 1 - self.window)
        rotation = reading.rotation[:, at]
        grouped = (batch * config.num_kv_heads, -1, config.head_dim)
        kv_shape = (batch, 2, config.num_kv_heads, config.head_dim)
        span = (first, at + 1 - first)
        bias = reading.bias.narrow(2, *span) if reading.ragged else None
        of_layers = zip(
            self.layers,
            reading.keys.narrow(3, *span).unbind(0),
            reading.values.narrow(2, *span).unbind(0),
            reading.slots.select(4, at).unbind(0),
            strict=True,
        )
        for (
            qkv_product,
            qkv_bias,
            o_product,
            gate_up_product,
            down_product,
        ), keys, values, slot in of_layers:
            qkv = qkv_product(x, self._norm(x))
            if qkv_bias is not None:
                qkv += qkv_bias
            self._turn(qkv, rotation)
            slot.copy_(qkv[:, self.query_size :].view(kv_shape))
            # (batch x kv_heads, queries of one, head_dim)
            q = qkv[:, : self.query_size].to(self.cache_dtype).reshape(grouped)
            scores = torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)
            x = x + o_product(torch.bmm(scores.softmax(-1), values).view(batch, -1), None)
            gate, up = gate_up_product(x, self._norm(x)).split_with_sizes(self.halves, 1)
            x += down_product(F.silu(gate).mul_(up), None)
        reading.length += 1
        return self._logits(x)

    @torch.inference_mode()
    def log_likelihoods(self, pattern: Pattern, sequences: Sequence[np.ndarray]) -> tuple[float, int]:
        """Sum of the natural log likelihoods of what is predicted in the sequences, each cut to the context,
        and its count."""
        total, count = 0.0, 0
        for whole in sequences:
            sequence = whole[: self.config.context + 1]
            _, hidden = self._read([sequence[:-1]], 0)
            targets = torch.from_numpy(sequence[1:].reshape(len(sequence) - 1, -1)).to(self.device)
            predicted = torch.from_numpy(pattern.predicted(sequence)[1:].reshape(targets.shape)).to(
                self.device
            )
            for stream, logits in enumerate(self._logits(hidden[0]).split(self.vocabularies, dim=-1)):
                chosen = predicted[:, stream]
                total -= float(
                    F.cross_entropy(logits[chosen], targets[chosen, stream], reduction="none").double().sum()
                )
            count += int(predicted.sum())
        return total, count

    def _read(self, prefixes: Sequence[np.ndarray], room: int) -> tuple[Reading, Tensor]:
        """What was read, and the last layer's states (batch, longest, dim) with the rows aligned at their
        ends."""
        config, batch = self.config, len(prefixes)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=self.device)
        longest = int(lengths.max())
        tokens = np.zeros((batch, longest, *prefixes[0].shape[1:]), np.int64)
        for row, prefix in enumerate(prefixes):
            tokens[row, longest - len(prefix) :] = prefix
        reading = Reading(self, lengths, longest, longest + room)
        table = torch.from_numpy(tokens).to(self.device)
        x = (
            F.embedding(table, self.table)
            if table.ndim == 2
            else F.embedding(table + self.offsets, self.table).sum(2)
        )
        mask = self._prefix_mask(reading, longest)
        rotation = reading.rotation[:, :longest].flatten(0, 1)
        x = x.flatten(0, 1)  # (batch x time, dim): products take rows
        for number, (qkv_product, qkv_bias, o_product, gate_up_product, down_product) in enumerate(
            self.layers
        ):
            qkv = qkv_product(x, self._norm(x))
            if qkv_bias is not None:
                qkv += qkv_bias
            self._turn(qkv, rotation)
            heads = qkv.to(self.cache_dtype).view(batch, longest, -1, config.head_dim).transpose(1, 2)
            q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
            reading.entries[number, 0, :, :, :longest], reading.entries[number, 1, :, :, :longest] = k, v
            grouped = config.num_heads != config.num_kv_heads
            attended = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=1.0, enable_gqa=grouped
            )
            x = x + o_product(attended.transpose(1, 2).flatten(0, 1).flatten(1).float(), None)
            gate, up = gate_up_product(x, self._norm(x)).split_with_sizes(self.halves, 1)
            x += down_product(F.silu(gate).mul_(up), None)
        reading.length = longest
        return reading, x.view(batch, longest, -1)

    def _prefix_mask(self, reading: Reading, longest: int) -> Tensor | None:
        """(batch, 1, query, key) bool where plain causality does not do. What stands before a row's beginning
        sees itself alone."""
        if not reading.ragged and (self.window is None or self.window >= longest):
            return None
        slots = torch.arange(longest, device=self.device)
        back = slots[:, None] - slots[None, :]
        seen = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
        real = slots[None, None, :] >= reading.starts[:, None, None]  # (batch, 1, key)
        return ((seen & real) | (back == 0))[:, None]

    def _turn(self, qkv: Tensor, rotation: Tensor) -> None:
        """Turn the queries and keys of rows (rows, query + 2 x key size) in place."""
        pairs = qkv[:, : self.query_size + self.key_size].view(len(qkv), -1, self.config.head_dim // 2, 2)
        torch.view_as_complex(pairs).mul_(rotation)

    def _norm(self, x: Tensor) -> Tensor:
        """What RMSNorm multiplies rows (rows, dim) with, (rows, 1). A product of few rows is scaled behind
        the matrix."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.epsilon, length, length, value=1 / self.config.dim).rsqrt_()

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(x, self._norm(x))


def bfloat16_product(weight: Tensor) -> Product:
    """With weights (out, in) laid out once for oneDNN where torch has it, on a CPU; else the plain
    product."""
    short = weight.bfloat16()
    packed: Tensor | None = None
    if (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        packed = torch.ops.mkldnn._reorder_linear_weight(short, 1)

    def product(x: Tensor, scale: Tensor | None) -> Tensor:
        x = x.bfloat16()
        y: Tensor = (
            F.linear(x, short)
            if packed is None
            else torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        )
        return y if scale is None else y * scale

    return product


class Int8Product:
    """Weights (out, in) in 8 bits, symmetric, a scale for each output channel. `weight` is what they stand
    for, (out, in)."""

    def __init__(self, weight: Tensor):
        # rounded first, so that both kernels have the same
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        self.integers = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.scale, self.wide_scale = scale, scale.float()
        self.none = torch.zeros(len(weight), dtype=torch.int64)
        self.packed: Tensor | None = None
        # Without VNNI oneDNN adds pairs of products in 16 bits, which overflow.
        if torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported():
            self.packed = torch.ops.onednn.qlinear_prepack(self.integers, None)

    @property
    def weight(self) -> Tensor:
        return self.integers * self.wide_scale[:, None]

    def __call__(self, x: Tensor, scale: Tensor | None) -> Tensor:
        # the kernel reads whole vectors, beyond a row's end if need be
        if len(x) == 1 and self.integers.shape[1] % 32 == 0:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.integers, self.scale)
            return y if scale is None else y * scale
        x = x.float()
        step = x.abs().amax(1, keepdim=True).mul_(1 / 127).clamp_(min=1e-30)
        rounded = (x / step).round_().to(torch.int8)
        step = step if scale is None else step * scale
        if self.packed is None:
            return torch._int_mm(rounded, self.integers.T) * step * self.wide_scale
        y = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            0,
            self.packed,
            self.wide_scale,
            self.none,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y.mul_(step)


def perplexity(nats: float, count: int) -> float:
    """Of a sum of natural log likelihoods over `count` symbols."""
    return math.exp(-nats / max(count, 1))
