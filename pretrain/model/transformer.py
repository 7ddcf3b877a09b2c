"""The context network of wav2vec 2.0 (section 2) and HuBERT: positions by convolution, and transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.packing import Layout
from pretrain.model.attention import Attending, attention
from pretrain.model.config import EncoderConfig
from pretrain.model.operations import dropout, gelu_linear, grouped_conv
from pretrain.model.streaming import Chunks


class PositionalConv(nn.Module):
    """Relative positions by a grouped convolution, weight-normalised over the kernel axis."""

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self._fused: tuple[tuple[int, ...], Tensor] | None = None
        self.direction = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        nn.init.normal_(self.direction, std=(4 / (kernel * dim)) ** 0.5)
        # (1, 1, kernel)
        self.magnitude = nn.Parameter(self.direction.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def train(self, mode: bool = True) -> "PositionalConv":
        self._fused = None  # neither fused AdamW nor FSDP2 shows in the version counters
        super().train(mode)
        return self

    def weight(self) -> Tensor:
        """The normalised weight; outside training it is computed once for each state of the parameters."""
        if torch.is_grad_enabled() or self.direction.is_inference():  # which has no version
            # an optimiser's step may follow, and a fused one leaves no trace in the versions
            self._fused = None
            return self._normalized()
        parameters = self.direction, self.magnitude
        state = tuple(number for x in parameters for number in (x.data_ptr(), x._version))
        if self._fused is None or self._fused[0] != state:
            self._fused = state, self._normalized()
        return self._fused[1]

    def _normalized(self) -> Tensor:
        return self.direction * (self.magnitude / self.direction.norm(dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor, place: Layout | Chunks) -> Tensor:
        """(frames, dim) to (frames, dim), or to the rows of chunks."""
        if isinstance(place, Chunks):
            return place.of_windows(self.of_windows(place.windows(x, self.kernel)))
        # Zeros between the utterances serve as the padding of both neighbours.
        pad = self.kernel // 2
        gap = x.new_zeros(pad, x.shape[1])
        parts = [part for utterance in place.split(x) for part in (utterance, gap)]
        y = grouped_conv(torch.cat([gap, *parts]), self.weight(), self.bias)  # (time, dim)
        sizes = [size for frames in place.num_frames for size in (frames, pad)]
        sizes[-1] = len(y) - sum(sizes[:-1])
        return F.gelu(torch.cat(y.split(sizes)[::2]))

    def of_windows(self, x: Tensor) -> Tensor:
        """Windows (windows, time, dim) with the context on both sides: (windows, time - kernel + 1, dim)."""
        y = F.conv1d(x.transpose(1, 2), self.weight(), self.bias, groups=self.groups)
        return F.gelu(y.transpose(1, 2))


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward with residuals, normalised before (`norm_first`) or after each."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.attention_out = nn.Linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        for linear in (self.qkv, self.attention_out, self.ffn_in, self.ffn_out):  # BERT's at width 768
            nn.init.normal_(linear.weight, std=0.02 * (768 / config.dim) ** 0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, place: Layout | Attending, keep: bool = True) -> Tensor:  # (frames, dim)
        """`keep` False drops the layer (LayerDrop).

        Its parameters stay in the graph with gradient zero, so that every rank reduces the same ones.
        """
        if not keep:
            return x + 0.0 * sum(parameter.flatten()[0] for parameter in self.parameters())
        return self.join(*self.residual_terms(x, place))

    def residual_terms(self, x: Tensor, place: Layout | Attending) -> tuple[Tensor, Tensor]:
        """The two terms of the last residual: the stream after attention, and the feed-forward's output."""
        if self.config.norm_first:
            x = x + self._attend(self.attention_norm(x), place)
            return x, self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self._attend(x, place))
        return x, self._feed_forward(x)

    def join(self, x: Tensor, update: Tensor) -> Tensor:
        """The layer's output from those two."""
        return x + update if self.config.norm_first else self.ffn_norm(x + update)

    def _attend(self, x: Tensor, place: Layout | Attending) -> Tensor:
        heads = self.qkv(x).view(len(x), 3, self.config.num_heads, -1)
        y = attention(heads, place, self.config.attention_dropout if self.training else 0.0)
        return dropout(self.attention_out(y), self.config.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = self.ffn_in(x)
        if self.training and self.config.activation_dropout > 0:
            y = self.ffn_out(dropout(F.gelu(y), self.config.activation_dropout, self.training))
        else:
            y = gelu_linear(y, self.ffn_out)
        return dropout(y, self.config.dropout, self.training)
