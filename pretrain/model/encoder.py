"""The encoder that wav2vec 2.0, HuBERT and CTC share: front end, feature projection, positions, transformer.

The front ends (pretrain/model/frontend.py) give one frame per 320 samples (20 ms). Batches are packed
(pretrain/data/packing.py): nothing is padded, and nothing an utterance is batched with changes its frames,
since normalisation statistics, the positional convolution and attention see its own samples only. With
`streaming` an encoder works in chunks (pretrain/model/streaming.py) and can run online
(pretrain/model/online.py); its weights have the same names and shapes.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import parse_config
from pretrain.data.packing import Layout, pack_padded
from pretrain.model.attention import Attending
from pretrain.model.blocks import Blocks, Windows, cut_blocks
from pretrain.model.config import EncoderConfig, LayerConvention
from pretrain.model.frontend import FilterbankFrontEnd, UnitFrontEnd, WaveformFrontEnd, normalize
from pretrain.model.int8 import quantize_linears
from pretrain.model.operations import dropout
from pretrain.model.streaming import Chunks
from pretrain.model.transformer import PositionalConv, TransformerLayer
from pretrain.training.checkpoint import load_weights

FrontEnd = WaveformFrontEnd | FilterbankFrontEnd | UnitFrontEnd
FRONT_ENDS: dict[str, type[FrontEnd]] = {
    "waveform": WaveformFrontEnd,
    "filterbank": FilterbankFrontEnd,
    "units": UnitFrontEnd,
}


class Context(NamedTuple):
    """The transformer's output."""

    last: Tensor  # (frames, dim): of the last layer that ran, behind the final norm where all ran
    layers: list[Tensor]  # (frames, dim) each: features of the layers asked for; 0 is the first layer's input


class Encoded(NamedTuple):
    """Everything of one forward: the front end's output before and behind its norm, and the transformer's."""

    features: Tensor  # (frames, front_end.dim)
    normed: Tensor  # (frames, front_end.dim)
    last: Tensor
    layers: list[Tensor]


class Encoder(nn.Module):
    """Waveforms to contextual frames; `draw_layers` sets the LayerDrop gates of a step."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.front_end = FRONT_ENDS[config.front_end](config)
        self.feature_norm = nn.LayerNorm(self.front_end.dim)
        self.project: nn.Module = nn.Linear(self.front_end.dim, config.dim)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim).uniform_())
        self.positional = PositionalConv(config.dim, config.pos_kernel, config.pos_groups)
        self.norm = nn.LayerNorm(config.dim)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.gates = [True] * config.num_layers

    def draw_layers(self, seed: int, step: int) -> None:
        """Draw the LayerDrop gates (Fan et al., 2020) of a step, the same on every rank."""
        drawn = np.random.default_rng([seed, step, 0x1D]).random(self.config.num_layers)
        self.gates = [bool(value >= self.config.layer_drop) for value in drawn]

    def encode(
        self,
        waveforms: Tensor,
        layout: Layout,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        *,
        totals: dict[str, Tensor] | None = None,
        layers: Collection[int] = (),
        convention: LayerConvention = "residual",
    ) -> Encoded:
        """A packed batch of waveforms (samples,), or of units (frames,) int64, through the encoder.

        The arguments are those of `features` and `contextualize`.
        """
        features = self.features(waveforms, layout, totals)  # (frames, front_end.dim)
        normed = self.feature_norm(features)
        context = self.contextualize(normed, layout, mask, channel_mask, layers, convention)
        return Encoded(features, normed, *context)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Padded waveforms (batch, samples) of lengths (batch,) to the last output (batch, frames, dim)."""
        buffer, layout = pack_padded(waveforms, num_samples)
        return layout.pad(self.encode(buffer, layout).last)

    def features(self, waveforms: Tensor, layout: Layout, totals: dict[str, Tensor] | None = None) -> Tensor:
        """Packed waveforms (samples,), or units (frames,) int64, to front-end output (frames, front_end.dim).

        The gradient is scaled by `feature_gradient_scale`. With `totals` (pretrain/model/totals.py) the
        waveforms are windows of one utterance, normalised as all of it is.
        """
        config = self.config
        if totals is not None:
            layout = Windows.of(layout, totals)
        elif config.streaming and config.front_end != "units" and not isinstance(layout, Blocks):
            waveforms, layout = cut_blocks(waveforms, layout, config.streaming, self.front_end.tail)
        if config.normalize_waveform:
            waveforms = normalize(waveforms, layout)
        return _ScaleGradient.apply(self.front_end(waveforms, layout), config.feature_gradient_scale)

    def embed(self, waveforms: Tensor, layout: Layout) -> Tensor:
        """Projected frames (frames, dim), without dropout or masks: what positions are added to."""
        embedded: Tensor = self.project(self.feature_norm(self.features(waveforms, layout)))
        return embedded

    def contextualize(
        self,
        normed: Tensor,
        layout: Layout,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        layers: Collection[int] = (),
        convention: LayerConvention = "residual",
    ) -> Context:
        """Normalised front-end features to the last output and the features of `layers`.

        `mask` (frames,) marks frames that the mask embedding replaces, `channel_mask` (batch, dim) channels
        that are zero in all frames of an utterance. All layers run, or those up to the last of `layers`. The
        last output of all has passed the final norm of pre-norm models; a layer's features have not
        (fairseq's `output_layer`).
        """
        x = dropout(self.project(normed), self.config.input_dropout, self.training)  # (frames, dim)
        if mask is not None:
            x = torch.where(mask[:, None], self.mask_embedding.to(x.dtype), x)
        if channel_mask is not None:
            parts = zip(layout.split(x), channel_mask, strict=True)
            x = torch.cat([part.masked_fill(row, 0.0) for part, row in parts])
        places: list[Layout | Attending]
        if self.config.streaming is None:
            places, originals = [layout] * self.config.num_layers, None
            x = x + self.positional(x, layout)
        else:
            chunks = Chunks(self.config.streaming, layout.num_frames, x.device)
            places, originals = [chunks] * self.config.num_layers, chunks.originals
            x = x.index_select(0, chunks.frames) + self.positional(x, chunks)
        return self.transform(x, places, originals, layers, convention)

    def transform(
        self,
        x: Tensor,
        places: Sequence[Layout | Attending],
        originals: Tensor | None,
        wanted: Collection[int],
        convention: LayerConvention = "residual",
    ) -> Context:
        """Rows (rows, dim) with their positions through the layers, each with its place.

        `originals` are the rows that are frames and not copies of some (None: all are); only those are
        returned. `wanted` are the `layers` of `contextualize`.
        """

        def frames(y: Tensor) -> Tensor:
            return y if originals is None else y.index_select(0, originals)

        if not self.config.norm_first:
            x = self.norm(x)
        x = dropout(x, self.config.dropout, self.training)
        found = [frames(x)] if 0 in wanted else []
        last = max(wanted, default=self.config.num_layers)
        for number, (layer, place) in enumerate(zip(self.layers, places, strict=True), start=1):
            if number > last:
                break
            if convention == "feed_forward":
                assert isinstance(layer, TransformerLayer)
                x, features = layer.residual_terms(x, place)
                x = layer.join(x, features)
            else:
                features = x = layer(x, place, not self.training or self.gates[number - 1])
            if number in wanted:
                found.append(frames(features))
        x = frames(x)
        return Context(self.norm(x) if self.config.norm_first and not wanted else x, found)

    @torch.no_grad()
    def extract_packed(
        self,
        waveforms: Tensor,
        layout: Layout,
        last: int,
        convention: LayerConvention = "residual",
        totals: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Features (frames, dim) of layers 0 .. `last` of a packed batch; no layer beyond `last` runs."""
        if not 0 <= last <= self.config.num_layers:
            raise ValueError(f"layer {last}: this encoder has layers 0 to {self.config.num_layers}")
        layers = range(last + 1)
        return self.encode(waveforms, layout, totals=totals, layers=layers, convention=convention).layers

    def extract(
        self, waveforms: Tensor, num_samples: Tensor, layer: int, convention: LayerConvention = "residual"
    ) -> Tensor:
        """Padded waveforms (batch, samples) float32 16 kHz to the features of `layer`, (batch, frames, dim).

        `num_samples` (batch,) int64 are their lengths; features are zero beyond an utterance's frames.
        """
        buffer, layout = pack_padded(waveforms, num_samples)
        return layout.pad(self.extract_packed(buffer, layout, layer, convention)[-1])

    def extract_all(self, waveforms: Tensor, num_samples: Tensor) -> list[Tensor]:
        """The features of every layer, 0 .. num_layers, in one pass, as `extract` returns them."""
        buffer, layout = pack_padded(waveforms, num_samples)
        return [*map(layout.pad, self.extract_packed(buffer, layout, self.config.num_layers))]

    def use_int8(self) -> None:
        """Compute all large matrix products in 8 bits from now on: for inference on a CPU.

        The linear layers' float weights are gone.
        """
        if isinstance(self.front_end, WaveformFrontEnd):
            self.front_end.use_int8()
        for parent in [self, *self.layers]:
            quantize_linears(parent)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def load_encoder(run: str | Path, device: str | torch.device = "cpu") -> tuple[Encoder, str]:
    """The encoder of a pretraining or fine-tuning run, or of a card, and its weights' fingerprint.

    It is in eval mode, and that of the best checkpoint where one was kept.
    """
    weights, meta, fingerprint = load_weights(run)
    # A fine-tuning run's own config names a pretraining run there; the architecture is beside its vocabulary.
    config = meta.get("config_encoder") or meta["config"].get("encoder")
    if config is None:
        raise ValueError(
            f"{run}: a {meta['kind']!r} run holds no encoder; give a pretraining or fine-tuning run"
        )
    encoder = Encoder(parse_config(EncoderConfig, config, f"{run}/meta.json"))
    prefix = "encoder."
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    encoder.load_state_dict(own)
    return encoder.eval().to(device), fingerprint
