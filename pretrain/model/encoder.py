"""The encoder that wav2vec 2.0, HuBERT and CTC share: front end, feature projection, positional convolution, transformer.

`base` and `large` are the published architectures (wav2vec 2.0: arXiv 2006.11477, section 4; HuBERT: arXiv 2106.07447,
table I), `xlarge` HuBERT's. `small` and `tiny` run on a CPU. Two front ends (pretrain/model/frontend.py) give one frame per 320
samples (20 ms): the waveform convolutions, and stacked log-mel filterbanks. Batches are packed (pretrain/data/packing.py): nothing is
padded, and nothing an utterance is batched with changes its frames, since normalisation statistics, the positional convolution
and attention see its own samples only. With `streaming` an encoder works in chunks (pretrain/model/streaming.py), and can run online
(pretrain/model/online.py); its weights have the same names and shapes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config, parse_config
from pretrain.data.packing import Layout, pack_padded
from pretrain.model.cpu_kernels import Int8Linear, attention, drop_values, dropout, gelu_linear, grouped_conv
from pretrain.model.frontend import (
    FilterbankFrontEnd,
    UnitFrontEnd,
    WaveformFrontEnd,
    normalize,
    normalize_so_far,
)
from pretrain.model.streaming import Attending, Blocks, Chunks, StreamingConfig, Windows, cut_blocks
from pretrain.training.checkpoint import load_weights

LayerConvention = Literal["residual", "feed_forward"]
"""Which features a layer has: its output, after the residual and in post-norm models the norm (fairseq's `output_layer`; HuBERT's
and wav2vec 2.0's units), or what its feed-forward adds to the residual (data2vec's and DinoSR's targets)."""

_LARGE: dict[str, Any] = {
    "num_heads": 16,
    "norm_first": True,
    "conv_norm": "layer",
    "normalize_waveform": True,
    "feature_gradient_scale": 1.0,
    "input_dropout": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layer_drop": 0.0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "base": {
        "dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_dim": 3072,
        "norm_first": False,
        "conv_norm": "group",
    },
    "large": {**_LARGE, "dim": 1024, "num_layers": 24, "ffn_dim": 4096},
    "xlarge": {**_LARGE, "dim": 1280, "num_layers": 48, "ffn_dim": 5120},
    "small": {
        "dim": 256,
        "num_layers": 4,
        "num_heads": 4,
        "ffn_dim": 1024,
        "norm_first": True,
        "conv_norm": "layer",
        "conv_dim": 128,
        "pos_kernel": 32,
        "pos_groups": 8,
        "front_end": "filterbank",
        "attention_dropout": 0.0,
        "layer_drop": 0.0,
    },
    "tiny": {
        "dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 128,
        "norm_first": True,
        "conv_norm": "layer",
        "conv_dim": 32,
        "pos_kernel": 16,
        "pos_groups": 4,
        "front_end": "filterbank",
        "attention_dropout": 0.0,
        "layer_drop": 0.0,
    },
}


class EncoderConfig(Config):
    """`architecture` fills every key that is not given; the defaults below are wav2vec 2.0 / HuBERT BASE.

    Released wav2vec 2.0 LARGE models have `conv_bias = true`, HuBERT LARGE models do not.
    """

    architecture: Literal["base", "large", "xlarge", "small", "tiny"] = "base"
    front_end: Literal["waveform", "filterbank", "units"] = "waveform"
    conv_dim: int = Field(512, gt=0)
    conv_norm: Literal["group", "layer"] = "group"
    conv_bias: bool = False
    num_units: int | None = Field(
        None, gt=0, description="of the front end of units: discrete labels in place of audio"
    )
    num_mels: int = Field(80, gt=0, description="of the filterbank front end; two frames are stacked")
    warp: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="of the filterbank: in training frequencies are stretched by up to this share, at random (VTLP)",
    )
    normalize_waveform: bool = Field(
        False, description="zero mean and unit variance over the utterance as cropped (LARGE)"
    )
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
    streaming: StreamingConfig | None = Field(
        None, description="work in chunks with a bounded look-ahead (pretrain/model/streaming.py)"
    )

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
        if (self.num_units is None) == (self.front_end == "units"):
            raise ValueError(
                f'num_units goes with front_end = "units" and with no other; front_end is {self.front_end!r}'
            )
        if self.warp and self.front_end != "filterbank":
            raise ValueError(f"warp is of the filterbank front end; front_end is {self.front_end!r}")
        if self.conv_bias and self.conv_norm == "group":
            raise ValueError(
                'conv_bias has no effect before the group norm; it goes with conv_norm = "layer"'
            )
        return self


class PositionalConv(nn.Module):
    """Relative positions by a grouped convolution (wav2vec 2.0, section 2), weight-normalised over the kernel axis."""

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self._fused: tuple[tuple[int, ...], Tensor] | None = None
        self.direction = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        nn.init.normal_(self.direction, std=(4 / (kernel * dim)) ** 0.5)
        self.magnitude = nn.Parameter(
            self.direction.detach().norm(dim=(0, 1), keepdim=True)
        )  # (1, 1, kernel)
        self.bias = nn.Parameter(torch.zeros(dim))

    def train(self, mode: bool = True) -> "PositionalConv":
        self._fused = None  # neither fused AdamW nor FSDP2 shows in the version counters
        super().train(mode)
        return self

    def weight(self) -> Tensor:
        """The normalised weight; outside training it is computed once for each state of the parameters."""
        if torch.is_grad_enabled() or self.direction.is_inference():  # which has no version
            self._fused = (
                None  # an optimiser's step may follow, and a fused one leaves no trace in the versions
            )
            return self.direction * (self.magnitude / self.direction.norm(dim=(0, 1), keepdim=True))
        state = (
            self.direction.data_ptr(),
            self.direction._version,
            self.magnitude.data_ptr(),
            self.magnitude._version,
        )
        if self._fused is None or self._fused[0] != state:
            self._fused = (
                state,
                self.direction * (self.magnitude / self.direction.norm(dim=(0, 1), keepdim=True)),
            )
        return self._fused[1]

    def forward(
        self, x: Tensor, layout: Layout | Chunks
    ) -> Tensor:  # (frames, dim) to (frames, dim), or to the rows of chunks
        if isinstance(layout, Chunks):
            return layout.of_windows(self.of_windows(layout.windows(x, self.kernel)))
        # Zeros between the utterances serve as the padding of both neighbours.
        pad = self.kernel // 2
        gap = x.new_zeros(pad, x.shape[1])
        spread = torch.cat(
            [gap, *[part for utterance in layout.split(x) for part in (utterance, gap)]]
        )  # (time, dim)
        y = grouped_conv(spread, self.weight(), self.bias)
        sizes = [size for frames in layout.num_frames for size in (frames, pad)]
        sizes[-1] = len(y) - sum(sizes[:-1])
        return F.gelu(torch.cat(y.split(sizes)[::2]))

    def of_windows(self, x: Tensor) -> Tensor:
        """For x (windows, time, dim) with what lies left and right of the frames in question: (windows, time - kernel + 1, dim)."""
        return F.gelu(
            F.conv1d(x.transpose(1, 2), self.weight(), self.bias, groups=self.groups).transpose(1, 2)
        )


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

    def forward(self, x: Tensor, layout: Layout | Attending, keep: bool = True) -> Tensor:  # (frames, dim)
        """`keep` False drops the layer (LayerDrop): its parameters stay in the graph with gradient zero, so that every rank
        reduces the same ones."""
        if not keep:
            return x + 0.0 * sum(parameter.flatten()[0] for parameter in self.parameters())
        return self.join(*self.residual_terms(x, layout))

    def residual_terms(self, x: Tensor, layout: Layout | Attending) -> tuple[Tensor, Tensor]:
        """The two terms of the last residual: the stream after attention, and the feed-forward's output."""
        if self.config.norm_first:
            x = x + self._attend(self.attention_norm(x), layout)
            return x, self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self._attend(x, layout))
        return x, self._feed_forward(x)

    def join(self, x: Tensor, update: Tensor) -> Tensor:
        """The layer's output from those two."""
        return x + update if self.config.norm_first else self.ffn_norm(x + update)

    def _attend(self, x: Tensor, layout: Layout | Attending) -> Tensor:
        heads = self.qkv(x).view(len(x), 3, self.config.num_heads, -1)
        rate = self.config.attention_dropout if self.training else 0.0
        y = (
            attention(heads, layout, rate)
            if isinstance(layout, Layout)
            else _attention_elsewhere(heads, layout, rate)
        )
        return dropout(self.attention_out(y), self.config.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = self.ffn_in(x)
        if self.training and self.config.activation_dropout > 0:
            y = self.ffn_out(dropout(F.gelu(y), self.config.activation_dropout, self.training))
        else:
            y = gelu_linear(y, self.ffn_out)
        return dropout(y, self.config.dropout, self.training)


@torch.compiler.disable  # as `attention`
def _attention_elsewhere(heads: Tensor, place: Attending, rate: float) -> Tensor:
    query, key, value = heads.unbind(1)
    return place.attend(query, key, drop_values(value, rate))


class Encoder(nn.Module):
    """Waveforms to contextual frames. `config` says everything; `draw_layers` sets the LayerDrop gates of a step."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        kinds: dict[str, type[WaveformFrontEnd] | type[FilterbankFrontEnd] | type[UnitFrontEnd]] = {
            "waveform": WaveformFrontEnd,
            "filterbank": FilterbankFrontEnd,
            "units": UnitFrontEnd,
        }
        self.front_end = kinds[config.front_end](config)
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

    def features(self, waveforms: Tensor, layout: Layout, totals: dict[str, Tensor] | None = None) -> Tensor:
        """Packed waveforms (samples,), or units (frames,) int64, to front-end output (frames, front_end.dim), its gradient scaled by
        `feature_gradient_scale`. With `totals` (pretrain/model/totals.py) they are windows of one utterance, normalised as all of it is."""
        if totals is not None:
            return self.block_features(waveforms, Windows.of(layout, totals))
        if self.config.streaming is not None and self.config.front_end != "units":
            return self.block_features(
                *cut_blocks(waveforms, layout, self.config.streaming, self.front_end.tail)
            )
        if self.config.normalize_waveform:
            waveforms = normalize(waveforms, layout)
        return _ScaleGradient.apply(self.front_end(waveforms, layout), self.config.feature_gradient_scale)

    def block_features(self, waveforms: Tensor, blocks: Blocks) -> Tensor:
        """`features` of blocks (samples,): those of the utterances' frames, (frames, front_end.dim)."""
        if self.config.normalize_waveform:
            waveforms = normalize_so_far(waveforms, blocks)
        return _ScaleGradient.apply(
            self.front_end(waveforms, blocks.layout, blocks), self.config.feature_gradient_scale
        )

    def contextualize(
        self,
        features: Tensor,
        layout: Layout,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        layer: int | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Normalised front-end features (frames, front_end.dim) to the last output, or to the output of `layer`: (frames, dim).

        `mask` (frames,) marks frames replaced by the mask embedding, `channel_mask` (batch, dim) channels set to zero in
        all frames of an utterance. The last output (layer None) has passed the final norm of pre-norm models; the output of a
        layer has not (fairseq's `output_layer` convention). The first layer's input and every layer's output are appended to
        `outputs`.
        """
        x = dropout(self.project(features), self.config.input_dropout, self.training)  # (frames, dim)
        if mask is not None:
            x = torch.where(mask[:, None], self.mask_embedding.to(x.dtype), x)
        if channel_mask is not None:
            x = torch.cat(
                [part.masked_fill(row, 0.0) for part, row in zip(layout.split(x), channel_mask, strict=True)]
            )
        return self._run(x, layout, layer, [] if outputs is None else outputs)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Padded waveforms (batch, samples) of lengths (batch,) to the last output (batch, frames, dim), zero where padded."""
        buffer, layout = pack_padded(waveforms, num_samples)
        return layout.pad(self.contextualize(self.feature_norm(self.features(buffer, layout)), layout))

    @torch.no_grad()
    def extract_packed(
        self,
        waveforms: Tensor,
        layout: Layout,
        last: int,
        convention: LayerConvention = "residual",
        totals: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Features (frames, dim) of layers 0 .. `last` of a packed batch; layer 0 is the first layer's input, and none beyond
        `last` runs. See LayerConvention for what the features of a layer are, and `features` for `totals`."""
        if not 0 <= last <= self.config.num_layers:
            raise ValueError(f"layer {last}: this encoder has layers 0 to {self.config.num_layers}")
        outputs: list[Tensor] = []
        x = self.project(self.feature_norm(self.features(waveforms, layout, totals)))
        self._run(x, layout, last, outputs, convention)
        return outputs

    def extract(
        self, waveforms: Tensor, num_samples: Tensor, layer: int, convention: LayerConvention = "residual"
    ) -> Tensor:
        """`extract_packed` for padded waveforms (batch, samples) float32 16 kHz of lengths num_samples (batch,) int64: the features of
        `layer`, (batch, frames, dim), zero beyond an utterance's frames."""
        buffer, layout = pack_padded(waveforms, num_samples)
        return layout.pad(self.extract_packed(buffer, layout, layer, convention)[-1])

    def extract_all(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """The features of every layer, 0 .. num_layers, in one pass."""
        buffer, layout = pack_padded(waveforms, num_samples)
        return [layout.pad(output) for output in self.extract_packed(buffer, layout, self.config.num_layers)]

    def use_int8(self) -> None:
        """Compute all large matrix products in 8 bits from now on: for inference on a CPU. The linear layers' float weights are gone."""
        if isinstance(self.front_end, WaveformFrontEnd):
            self.front_end.use_int8()
        for parent in [self, *self.layers]:
            for name, linear in [*parent.named_children()]:
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, Int8Linear(linear.weight, linear.bias))

    def _run(
        self,
        x: Tensor,
        layout: Layout,
        layer: int | None,
        outputs: list[Tensor],
        convention: LayerConvention = "residual",
    ) -> Tensor:
        """Projected frames through the transformer up to `layer`; every layer's features are appended to `outputs`."""
        if self.config.streaming is None:
            places: list[Layout | Attending] = [layout] * self.config.num_layers
            return self.transform(x + self.positional(x, layout), places, None, layer, outputs, convention)
        chunks = Chunks(self.config.streaming, layout.num_frames, x.device)
        x = x.index_select(0, chunks.frames) + self.positional(x, chunks)
        return self.transform(
            x, [chunks] * self.config.num_layers, chunks.originals, layer, outputs, convention
        )

    def transform(
        self,
        x: Tensor,
        places: Sequence[Layout | Attending],
        originals: Tensor | None,
        layer: int | None,
        outputs: list[Tensor],
        convention: LayerConvention = "residual",
    ) -> Tensor:
        """Rows (rows, dim) with their positions through the layers, each with its place. `originals` says which rows are frames
        and not copies of some (None: all are); only those are returned and appended to `outputs`."""

        def frames(y: Tensor) -> Tensor:
            return y if originals is None else y.index_select(0, originals)

        if not self.config.norm_first:
            x = self.norm(x)
        x = dropout(x, self.config.dropout, self.training)
        outputs.append(frames(x))
        for number, (block, place) in enumerate(zip(self.layers, places, strict=True), start=1):
            if layer is not None and number > layer:
                break
            if convention == "feed_forward":
                assert isinstance(block, TransformerLayer)
                x, update = block.residual_terms(x, place)
                outputs.append(frames(update))
                x = block.join(x, update)
            else:
                x = block(x, place, not self.training or self.gates[number - 1])
                outputs.append(frames(x))
        x = frames(x)
        return self.norm(x) if self.config.norm_first and layer is None else x


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def load_encoder(run: str | Path, device: str | torch.device = "cpu") -> tuple[Encoder, str]:
    """The encoder of a pretraining or fine-tuning run (its best where one was kept), or of a card (`fairseq2:NAME`), in eval mode, and
    the weights' fingerprint."""
    weights, meta, fingerprint = load_weights(run)
    # A fine-tuning run's own config names a pretraining run there; the architecture stands beside its vocabulary.
    config = meta.get("config_encoder") or meta["config"].get("encoder")
    if config is None:
        raise ValueError(
            f"{run}: a {meta['kind']!r} run holds no encoder; give a pretraining or fine-tuning run"
        )
    encoder = Encoder(parse_config(EncoderConfig, config, f"{run}/meta.json"))
    own = {
        name.removeprefix("encoder."): tensor
        for name, tensor in weights.items()
        if name.startswith("encoder.")
    }
    encoder.load_state_dict(own)
    return encoder.eval().to(device), fingerprint
