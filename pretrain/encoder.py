"""The encoder that wav2vec 2.0, HuBERT and CTC share: front end, feature projection, positional convolution, transformer.

`base` and `large` are the published architectures (wav2vec 2.0: arXiv 2006.11477, section 4; HuBERT: arXiv 2106.07447,
table I), `xlarge` HuBERT's. `small` and `tiny` run on a CPU. Two front ends (pretrain/frontend.py) give one frame per 320
samples (20 ms): the waveform convolutions, and stacked log-mel filterbanks. Nothing an utterance is padded with or batched
with changes its frames: normalisation statistics, the positional convolution and attention see valid samples only.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.checkpoint import load_weights
from pretrain.config import Config, parse_config
from pretrain.frontend import FilterbankFrontEnd, WaveformFrontEnd, num_frames

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "base": {"dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072, "norm_first": False, "conv_norm": "group"},
    "large": {
        "dim": 1024, "num_layers": 24, "num_heads": 16, "ffn_dim": 4096, "norm_first": True, "conv_norm": "layer",
        "normalize_waveform": True, "dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0, "feature_gradient_scale": 1.0,
    },
    "xlarge": {
        "dim": 1280, "num_layers": 48, "num_heads": 16, "ffn_dim": 5120, "norm_first": True, "conv_norm": "layer",
        "normalize_waveform": True, "dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0, "feature_gradient_scale": 1.0,
    },
    "small": {
        "dim": 256, "num_layers": 4, "num_heads": 4, "ffn_dim": 1024, "norm_first": True, "conv_norm": "layer", "conv_dim": 128,
        "pos_kernel": 32, "pos_groups": 8, "front_end": "filterbank", "attention_dropout": 0.0, "layer_drop": 0.0,
    },
    "tiny": {
        "dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 128, "norm_first": True, "conv_norm": "layer", "conv_dim": 32,
        "pos_kernel": 16, "pos_groups": 4, "front_end": "filterbank", "attention_dropout": 0.0, "layer_drop": 0.0,
    },
}  # fmt: skip


class EncoderConfig(Config):
    """`architecture` fills every key that is not given; the defaults below are wav2vec 2.0 / HuBERT BASE.

    Released wav2vec 2.0 LARGE models have `conv_bias = true`, HuBERT LARGE models do not.
    """

    architecture: Literal["base", "large", "xlarge", "small", "tiny"] = "base"
    front_end: Literal["waveform", "filterbank"] = "waveform"
    conv_dim: int = Field(512, gt=0)
    conv_norm: Literal["group", "layer"] = "group"
    conv_bias: bool = False
    num_mels: int = Field(80, gt=0, description="of the filterbank front end; two frames are stacked")
    normalize_waveform: bool = Field(False, description="zero mean and unit variance over the utterance (LARGE)")
    dim: int = Field(768, gt=0)
    num_layers: int = Field(12, gt=0)
    num_heads: int = Field(12, gt=0)
    ffn_dim: int = Field(3072, gt=0)
    norm_first: bool = False
    pos_kernel: int = Field(128, gt=0)
    pos_groups: int = Field(16, gt=0)
    input_dropout: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    activation_dropout: float = Field(0.0, ge=0, lt=1)
    layer_drop: float = Field(0.05, ge=0, lt=1)
    feature_gradient_scale: float = Field(0.1, ge=0, description="multiplies the front end's gradient")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_architecture(cls, given: Any) -> Any:
        if isinstance(given, dict):
            name = given.get("architecture", "base")
            return {**(ARCHITECTURES.get(name, {}) if isinstance(name, str) else {}), **given}
        return given

    @model_validator(mode="after")
    def _check_divisibility(self) -> "EncoderConfig":
        for name, divisor in (("num_heads", self.num_heads), ("pos_groups", self.pos_groups)):
            if self.dim % divisor:
                raise ValueError(f"dim {self.dim} is not a multiple of {name} {divisor}")
        if self.conv_bias and self.conv_norm == "group":
            raise ValueError('conv_bias has no effect before the group norm; it goes with conv_norm = "layer"')
        return self


class PositionalConv(nn.Module):
    """Relative positions by a grouped convolution (wav2vec 2.0, section 2), weight-normalised over the kernel axis."""

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self.direction = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        nn.init.normal_(self.direction, std=(4 / (kernel * dim)) ** 0.5)
        self.magnitude = nn.Parameter(self.direction.detach().norm(dim=(0, 1), keepdim=True))  # (1, 1, kernel)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # (batch, frames, dim), zero where padded
        weight = self.direction * (self.magnitude / self.direction.norm(dim=(0, 1), keepdim=True))
        y = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)


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

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:  # (batch, frames, dim)
        if self.config.norm_first:
            x = x + self._attend(self.attention_norm(x), attention_mask)
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self._attend(x, attention_mask))
        return self.ffn_norm(x + self._feed_forward(x))

    def _attend(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        batch, frames, dim = x.shape
        heads = self.qkv(x).view(batch, frames, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)  # (batch, heads, frames, head_dim)
        rate = self.config.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=rate)
        y = self.attention_out(y.transpose(1, 2).reshape(batch, frames, dim))
        return F.dropout(y, self.config.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.gelu(self.ffn_in(x)), self.config.activation_dropout, self.training)
        return F.dropout(self.ffn_out(y), self.config.dropout, self.training)


class Encoder(nn.Module):
    """Waveforms to contextual frames. `config` says everything; `draw_layers` sets the LayerDrop gates of a step."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        front_end = WaveformFrontEnd if config.front_end == "waveform" else FilterbankFrontEnd
        self.front_end: WaveformFrontEnd | FilterbankFrontEnd = front_end(config)
        self.feature_norm = nn.LayerNorm(self.front_end.dim)
        self.project: nn.Module = nn.Linear(self.front_end.dim, config.dim)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim).uniform_())
        self.positional = PositionalConv(config.dim, config.pos_kernel, config.pos_groups)
        self.norm = nn.LayerNorm(config.dim)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.gates = [True] * config.num_layers

    def draw_layers(self, seed: int, step: int) -> None:
        """Draw the LayerDrop gates (Fan et al., 2020) of a step: the same on every rank, so that DDP needs no search."""
        drawn = np.random.default_rng([seed, step, 0x1D]).random(self.config.num_layers)
        self.gates = [bool(value >= self.config.layer_drop) for value in drawn]

    def features(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Front-end output (batch, frames, front_end.dim), its gradient scaled by `feature_gradient_scale`."""
        if self.config.normalize_waveform:
            waveforms = _normalize(waveforms, num_samples)
        return _ScaleGradient.apply(self.front_end(waveforms, num_samples), self.config.feature_gradient_scale)

    def contextualize(
        self,
        features: Tensor,
        num_samples: Tensor,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Normalised front-end features (batch, frames, front_end.dim) to the last output, or to the output of `layer`.

        `mask` (batch, frames) marks frames replaced by the mask embedding, `channel_mask` (batch, dim) channels set to zero in
        all frames. The last output (layer None) has passed the final
        norm of pre-norm models; the output of a layer has not (fairseq's `output_layer` convention).
        """
        x = F.dropout(self.project(features), self.config.input_dropout, self.training)  # (batch, frames, dim)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        if channel_mask is not None:
            x = x.masked_fill(channel_mask[:, None], 0.0)
        return self._run(x, num_samples, layer, [])

    def forward(self, waveforms: Tensor, num_samples: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.contextualize(self.feature_norm(self.features(waveforms, num_samples)), num_samples, mask)

    @torch.no_grad()
    def extract(self, waveforms: Tensor, num_samples: Tensor, layer: int) -> Tensor:
        """Features of `layer` (1 .. num_layers: after that layer's residual; 0: the first layer's input), and no layer beyond.

        waveforms (batch, samples) float32 16 kHz, num_samples (batch,) int64. Returns (batch, frames, dim); frames beyond
        `num_frames(num_samples[i])` are meaningless.
        """
        if not 0 <= layer <= self.config.num_layers:
            raise ValueError(f"layer {layer}: this encoder has layers 0 to {self.config.num_layers}")
        return self.contextualize(self.feature_norm(self.features(waveforms, num_samples)), num_samples, layer=layer)

    @torch.no_grad()
    def extract_all(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """The features of every layer, 0 .. num_layers, in one pass."""
        outputs: list[Tensor] = []
        x = self.project(self.feature_norm(self.features(waveforms, num_samples)))
        self._run(x, num_samples, self.config.num_layers, outputs)
        return outputs

    def _run(self, x: Tensor, num_samples: Tensor, layer: int | None, outputs: list[Tensor]) -> Tensor:
        """Projected frames through the transformer up to `layer`; every layer's output is appended to `outputs`."""
        frames = x.shape[1]
        valid = torch.arange(frames, device=x.device) < num_frames(num_samples)[:, None]  # (batch, frames)
        attention_mask = None if x.device.type == "cpu" and bool(valid.all()) else valid[:, None, None, :]
        x = x * valid[..., None]
        x = x + self.positional(x)
        if not self.config.norm_first:
            x = self.norm(x)
        x = F.dropout(x, self.config.dropout, self.training)
        outputs.append(x)
        for number, block in enumerate(self.layers, start=1):
            if layer is not None and number > layer:
                break
            if self.training and not self.gates[number - 1]:
                # A dropped layer stays in the graph with gradient zero, so that every rank reduces the same parameters.
                x = x + 0.0 * sum(p.flatten()[0] for p in block.parameters())
                continue
            x = block(x, attention_mask)
            outputs.append(x)
        return self.norm(x) if self.config.norm_first and layer is None else x


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def _normalize(waveforms: Tensor, num_samples: Tensor) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples; padding becomes zero."""
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < num_samples[:, None]
    count = num_samples[:, None].to(waveforms.dtype)
    mean = (waveforms * valid).sum(1, keepdim=True) / count
    centred = (waveforms - mean) * valid
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count + 1e-5)


def load_encoder(run: str | Path, device: str | torch.device = "cpu") -> tuple[Encoder, str]:
    """The encoder of a pretraining or fine-tuning run, in eval mode, and the fingerprint of the run's weights."""
    weights, meta, fingerprint = load_weights(run)
    # A fine-tuning run's own config names a pretraining run there; the architecture stands beside its vocabulary.
    config = meta.get("config_encoder") or meta["config"].get("encoder")
    if config is None:
        raise ValueError(f"{run}: a {meta['kind']!r} run holds no encoder; give a pretraining or fine-tuning run")
    encoder = Encoder(parse_config(EncoderConfig, config, f"{run}/meta.json"))
    own = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    encoder.load_state_dict(own)
    return encoder.eval().to(device), fingerprint
