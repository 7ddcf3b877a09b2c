"""Front ends: packed waveforms (pretrain/data/packing.py) at 16 kHz to one frame per 320 samples.

`WaveformFrontEnd` is wav2vec 2.0's, `FilterbankFrontEnd` stacks log-mel energies, `UnitFrontEnd` reads
discrete units. The first two give floor((n - 400) / 320) + 1 frames for n samples, and a frame depends on its
own utterance alone. Activations are (time, channel): a strided convolution is then a matrix product over a
view. Given `Blocks` (pretrain/model/blocks.py), a layout of a streaming encoder, statistics over time are
theirs.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP
from pretrain.model.blocks import Blocks
from pretrain.model.config import EncoderConfig
from pretrain.model.int8 import Int8Linear
from pretrain.model.operations import gelu_conv, segment_linear

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
WARPS = 21  # of the frequency axis, evenly spaced: training with `warp` draws from these
WARP_KNEE_HZ = 4800.0  # as in Jaitly & Hinton


def normalize(waveforms: Tensor, layout: Layout) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples; what lies between is zero."""
    if isinstance(layout, Blocks):
        return layout.normalize(waveforms)
    y = torch.zeros_like(waveforms)
    for own, part in zip(layout.cut(y), layout.cut(waveforms), strict=True):
        variance, mean = torch.var_mean(part, correction=0)
        own.copy_((part - mean) * torch.rsqrt(variance + 1e-5))
    return y


class WaveformFrontEnd(nn.Module):
    """wav2vec 2.0's seven convolutions (section 2), each followed by a norm and a GELU.

    With `conv_norm = "group"` the first has per-channel statistics over time and the others no norm (BASE);
    with `"layer"` each has a LayerNorm (LARGE).
    """

    tail = 80  # samples beyond its hop of 320 that a frame needs

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dim = config.conv_dim
        self.group_norm = self.has_statistics = config.conv_norm == "group"  # statistics: over time
        inputs = [1] + [config.conv_dim] * (len(CONV_KERNELS) - 1)
        # (kernel, in, out): tap-major, so that a product over stacked rows is a plain matrix product.
        shapes = [(k, channels, self.dim) for k, channels in zip(CONV_KERNELS, inputs, strict=True)]
        self.weights = nn.ParameterList(
            nn.init.normal_(torch.empty(shape), std=(2 / (shape[0] * shape[1])) ** 0.5) for shape in shapes
        )
        self.biases = nn.ParameterList(torch.zeros(self.dim) for _ in shapes) if config.conv_bias else None
        self.norms = nn.ModuleList(
            nn.LayerNorm(self.dim) for _ in (shapes[:1] if self.group_norm else shapes)
        )
        self.int8: list[Int8Linear] = []

    def use_int8(self) -> None:
        """Compute all convolutions but the first in 8 bits, from now on."""
        self.int8 = [Int8Linear(weight.flatten(0, 1).T, kernel=len(weight)) for weight in [*self.weights][1:]]

    def forward(self, waveforms: Tensor, layout: Layout) -> Tensor:
        """Packed waveforms (samples,) to (frames, dim)."""
        x = self._first(waveforms, layout)  # (time, channel) over the whole buffer
        for layer in range(1, len(CONV_KERNELS)):
            weight = self.int8[layer - 1] if self.int8 else self.weights[layer]
            x = gelu_conv(x, weight, self._bias(layer), self._norm(layer - 1))
        x, norm = layout.drop_between(x), self._norm(len(CONV_KERNELS) - 1)
        return F.gelu(x if norm is None else norm(x))

    def add_up(self, waveforms: Tensor, blocks: Blocks) -> None:
        """Add the sums of `blocks` to their totals, without the convolutions."""
        self._moments(self._windows(waveforms, blocks)[1], blocks)

    def _bias(self, layer: int) -> Tensor | None:
        return None if self.biases is None else self.biases[layer]

    def _norm(self, layer: int) -> nn.LayerNorm | None:
        """The layer norm before a GELU; the group norm is in the first convolution's weights."""
        norm = None if self.group_norm else self.norms[layer]
        assert norm is None or isinstance(norm, nn.LayerNorm)
        return norm

    def _first(self, waveforms: Tensor, layout: Layout) -> Tensor:
        weight = self.weights[0].squeeze(1)  # (10, channel)
        if not self.group_norm:
            x = waveforms.unfold(0, CONV_KERNELS[0], CONV_STRIDES[0]) @ weight
            return x if self.biases is None else x + self.biases[0]
        parts, valid = self._windows(waveforms, layout)
        scale, shift = self._group_norm(valid, weight, layout)
        return segment_linear(parts, weight * scale[:, None, :], shift)

    def _windows(self, waveforms: Tensor, layout: Layout) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Inputs (time_i, 10) of the first convolution, by slot: all, and those of own samples alone."""
        kernel, stride = CONV_KERNELS[0], CONV_STRIDES[0]
        windows = waveforms.unfold(0, kernel, stride)
        sizes = [slot * HOP // stride for slot in layout.slots]
        sizes[-1] -= sum(sizes) - len(windows)
        parts = windows.split(sizes)
        own = zip(parts, layout.num_samples, strict=True)
        return parts, [part[: (length - kernel) // stride + 1] for part, length in own]

    def _group_norm(self, windows: list[Tensor], weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Scale and shift (batch, channel) that make windows @ weight the GroupNorm (a group per channel).

        With one input channel a channel's mean and variance over time follow from the mean m and the
        covariance S of the windows (time_i, 10), as w.m and w'Sw: no pass over the network's largest
        activation. In float64.
        """
        norm = self.norms[0]
        assert isinstance(norm, nn.LayerNorm)
        with torch.autocast(weight.device.type, enabled=False):
            mean, product = self._moments(windows, layout)  # (batch, 10), (batch, 10, 10)
            covariance = product - mean[:, :, None] * mean[:, None, :]
            kernel = weight.double()
            variance = torch.einsum("kc,bkl,lc->bc", kernel, covariance, kernel).clamp(min=0)
            scale = norm.weight.double() * torch.rsqrt(variance + norm.eps)  # (batch, channel)
            shift = norm.bias.double() - scale * (mean @ kernel)
        return scale.to(weight.dtype), shift.to(weight.dtype)

    def _moments(self, windows: list[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        wide = [part.double() for part in windows]
        if isinstance(layout, Blocks):
            return layout.window_moments(wide, CONV_STRIDES[0])
        mean = torch.stack([part.mean(0) for part in wide])
        return mean, torch.stack([part.T @ part / len(part) for part in wide])


class FilterbankFrontEnd(nn.Module):
    """Log-mel filterbanks, 25 ms windows every 10 ms, two stacked per frame.

    This is Fast-HuBERT's (arXiv 2309.13860, section 3.1). Each mel band has zero mean and unit variance over
    the utterance's own frames. Frame t stacks the windows at 320 t and 320 t + 160; where the second would
    end beyond the utterance the first is repeated. Nothing here is learned. With `warp`, training changes
    each utterance's vocal tract length (VTLP), so that a few voices teach what many would.
    """

    tail = 240
    has_statistics = True

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dim = 2 * config.num_mels
        self.window: Tensor
        self.mel: Tensor
        self.warped: Tensor | None  # (warps, bins, mel)
        self.register_buffer("window", torch.hann_window(400, periodic=False) ** 0.85, persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel_matrix(config.num_mels)), persistent=False)
        factors = np.linspace(1 - config.warp, 1 + config.warp, WARPS).tolist() if config.warp else []
        matrices = [torch.from_numpy(mel_matrix(config.num_mels, warp=factor)) for factor in factors]
        self.register_buffer("warped", torch.stack(matrices) if matrices else None, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, layout: Layout) -> Tensor:
        """Packed waveforms (samples,) to (frames, dim)."""
        mels = self._log_mels(waveforms, layout)
        normal = layout.normalize_bands(mels) if isinstance(layout, Blocks) else map(_normalize_bands, mels)
        frames = zip(normal, layout.num_frames, strict=True)
        return torch.cat([_stack(mel, count) for mel, count in frames])

    def add_up(self, waveforms: Tensor, blocks: Blocks) -> None:
        """Add the sums of `blocks` to their totals."""
        self(waveforms, blocks)

    def _log_mels(self, waveforms: Tensor, layout: Layout) -> list[Tensor]:
        """Log-mel energies of each slot, (windows at 100 Hz, mel)."""
        with torch.autocast(waveforms.device.type, enabled=False):
            if not self.training or self.warped is None:
                mel = log_mel(waveforms, self.window, self.mel)  # over the whole buffer
                starts = [first * (HOP // 160) for first, _ in layout.slot_bounds]
                slots = zip(starts, layout.num_samples, strict=True)
                return [mel[start : start + (length - 400) // 160 + 1] for start, length in slots]
            each = layout.num_blocks if isinstance(layout, Blocks) else [1] * len(layout.slots)
            # One for all blocks of an utterance.
            drawn = np.repeat(torch.randint(WARPS, (len(each),)).numpy(), each).tolist()
            parts = zip(layout.cut(waveforms), drawn, strict=True)
            return [log_mel(part, self.window, self.warped[warp]) for part, warp in parts]


class UnitFrontEnd(nn.Module):
    """Discrete units in place of audio: an embedding for each, as wide as the model."""

    tail = 0
    has_statistics = False

    def __init__(self, config: EncoderConfig):
        super().__init__()
        assert config.num_units is not None
        self.dim = config.dim
        self.embeddings = nn.Parameter(torch.randn(config.num_units, config.dim))

    def forward(self, units: Tensor, layout: Layout) -> Tensor:
        """Units (frames,) int64, the utterances' end to end, to (frames, dim).

        The embeddings of several, (frames, levels), are added.
        """
        embedded = F.embedding(units, self.embeddings)
        return embedded if units.ndim == 1 else embedded.sum(1)


def _normalize_bands(mel: Tensor) -> Tensor:
    """Log-mel energies (windows, mel), each band with zero mean and unit variance."""
    return (mel - mel.mean(0)) * torch.rsqrt(mel.var(0, correction=0) + 1e-5)


def _stack(mel: Tensor, frames: int) -> Tensor:
    """One utterance's normalised log-mel energies (windows, mel), two windows to a frame: (frames, 2 mel)."""
    first, second = mel[: 2 * frames : 2], mel[1 : 2 * frames : 2]
    return torch.cat([first, second if len(second) == frames else torch.cat([second, first[-1:]])], dim=1)


def log_mel(waveforms: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Kaldi-like log-mel energies (..., time, mel) of waveforms in [-1, 1].

    Windows have 400 samples, every 160, without padding at the edges.
    """
    frames = (waveforms * 32768.0).unfold(-1, 400, 160)  # (..., time, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ mel).clamp(min=1.0).log()


def mel_matrix(
    num_mels: int, low_hz: float = 20.0, high_hz: float = 8000.0, fft_size: int = 512, warp: float = 1.0
) -> np.ndarray:
    """Filters (fft_size / 2 + 1, num_mels) float32 as Kaldi's.

    They are equally spaced and triangular on the mel scale 1127 ln(1 + f / 700). The frequencies of a
    spectrum are first multiplied with `warp`, as far as WARP_KNEE_HZ or what leads there, and go on in a
    straight line to 8 kHz (Jaitly & Hinton, "Vocal tract length perturbation improves speech recognition",
    2013, section 3).
    """

    def to_mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(to_mel(low_hz), to_mel(high_hz), num_mels + 2)
    hertz, knee = np.arange(fft_size // 2 + 1) * 16000 / fft_size, WARP_KNEE_HZ * min(warp, 1.0)
    if warp != 1.0:
        hertz = np.interp(hertz, [0.0, knee / warp, 8000.0], [0.0, knee, 8000.0])
    bins = to_mel(hertz)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
