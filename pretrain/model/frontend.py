"""Front ends: packed waveforms (pretrain/data/packing.py) at 16 kHz to one frame per 320 samples.

Both give floor((n - 400) / 320) + 1 frames for n samples, and a frame depends on its own utterance alone.
Activations are (time, channel): a strided convolution is then a matrix product over a view.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP
from pretrain.model.cpu_kernels import Int8Linear, gelu_conv, segment_linear
from pretrain.model.streaming import Blocks

if TYPE_CHECKING:
    from pretrain.model.encoder import EncoderConfig

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
WARPS = 21  # of the frequency axis, evenly spaced: what training with `warp` draws from
WARP_KNEE_HZ = 4800.0  # as in Jaitly & Hinton


def normalize(waveforms: Tensor, layout: Layout) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples; what lies between is zero."""
    y = torch.zeros_like(waveforms)
    for (first, _), length in zip(layout.slot_bounds, layout.num_samples, strict=True):
        own = slice(HOP * first, HOP * first + length)
        variance, mean = torch.var_mean(waveforms[own], correction=0)
        y[own] = (waveforms[own] - mean) * torch.rsqrt(variance + 1e-5)
    return y


def normalize_so_far(waveforms: Tensor, blocks: Blocks) -> Tensor:
    """Each block by the mean and the variance from its utterance's beginning to the block's end."""
    parts = [
        waveforms[HOP * first : HOP * first + length]
        for (first, _), length in zip(blocks.layout.slot_bounds, blocks.layout.num_samples, strict=True)
    ]
    new = [part[overlap:].double() for part, overlap in zip(parts, blocks.overlaps, strict=True)]
    sums = [torch.stack([part.sum(), part.square().sum()]) for part in new]
    total = blocks.through("waveform", _counted([len(part) for part in new], sums))
    mean, square = (total[:, 1:] / total[:, :1]).unbind(1)
    scale = torch.rsqrt((square - mean.square()).clamp(min=0) + 1e-5)
    y = torch.zeros_like(waveforms)
    for (first, _), part, m, s in zip(blocks.layout.slot_bounds, parts, mean, scale, strict=True):
        y[HOP * first : HOP * first + len(part)] = (part - m) * s
    return y


def _counted(counts: list[int], sums: list[Tensor]) -> Tensor:
    """Sums over blocks, (k,) float64 each, behind how many each is of: (blocks, 1 + k). The counts go to the device together."""
    stacked = torch.stack(sums)
    return torch.cat([stacked.new_tensor(counts)[:, None], stacked], dim=1)


class WaveformFrontEnd(nn.Module):
    """wav2vec 2.0's seven convolutions. `conv_norm = "group"`: per-channel statistics over time after the first one (BASE);
    `"layer"`: LayerNorm after each (LARGE)."""

    tail = 80  # samples beyond its hop of 320 that a frame needs

    def __init__(self, config: "EncoderConfig"):
        super().__init__()
        self.dim = config.conv_dim
        self.group_norm = self.has_statistics = config.conv_norm == "group"  # statistics: over time
        inputs = [1] + [config.conv_dim] * (len(CONV_KERNELS) - 1)
        # (kernel, in, out): tap-major, so that a product over stacked rows is a plain matrix product.
        self.weights = nn.ParameterList(
            nn.init.normal_(
                torch.empty(kernel, channels, config.conv_dim), std=(2 / (kernel * channels)) ** 0.5
            )
            for kernel, channels in zip(CONV_KERNELS, inputs, strict=True)
        )
        self.biases = (
            nn.ParameterList(torch.zeros(config.conv_dim) for _ in CONV_KERNELS) if config.conv_bias else None
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(config.conv_dim) for _ in range(1 if self.group_norm else len(CONV_KERNELS))
        )
        self.int8: list[Int8Linear] = []

    def use_int8(self) -> None:
        """Compute all convolutions but the first in 8 bits, from now on."""
        self.int8 = [Int8Linear(weight.flatten(0, 1).T, kernel=len(weight)) for weight in [*self.weights][1:]]

    def forward(self, waveforms: Tensor, layout: Layout, blocks: Blocks | None = None) -> Tensor:
        """Packed waveforms (samples,) to (frames, dim). In streaming `layout` is that of `blocks`, whose statistics go on; so it is with
        windows, whose statistics are their utterance's."""
        x = self._first(waveforms, layout, blocks)  # (time, channel) over the whole buffer
        for layer in range(1, len(CONV_KERNELS)):
            weight = self.int8[layer - 1] if self.int8 else self.weights[layer]
            x = gelu_conv(
                x, weight, None if self.biases is None else self.biases[layer], self._norm(layer - 1)
            )
        x, norm = layout.drop_between(x), self._norm(len(CONV_KERNELS) - 1)
        return F.gelu(x if norm is None else norm(x))

    def add_up(self, waveforms: Tensor, blocks: Blocks) -> None:
        """Add what `forward` would to the totals of `blocks`, and compute nothing else."""
        _moments_so_far([part.double() for part in self._windows(waveforms, blocks.layout)[1]], blocks)

    def _norm(self, layer: int) -> nn.LayerNorm | None:
        """The layer norm between a convolution and its GELU; the group norm is in the first convolution's weights."""
        norm = None if self.group_norm else self.norms[layer]
        assert norm is None or isinstance(norm, nn.LayerNorm)
        return norm

    def _first(self, waveforms: Tensor, layout: Layout, blocks: Blocks | None) -> Tensor:
        weight = self.weights[0].squeeze(1)  # (10, channel)
        if not self.group_norm:
            x = waveforms.unfold(0, CONV_KERNELS[0], CONV_STRIDES[0]) @ weight
            return x if self.biases is None else x + self.biases[0]
        parts, valid = self._windows(waveforms, layout)
        scale, shift = _group_norm_of_linear(valid, weight, self.norms[0], blocks)
        return segment_linear(parts, weight * scale[:, None, :], shift)

    def _windows(self, waveforms: Tensor, layout: Layout) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Inputs (time_i, 10) of the first convolution, by slot: all, and those that have no sample beyond the slot's own."""
        kernel, stride = CONV_KERNELS[0], CONV_STRIDES[0]
        windows = waveforms.unfold(0, kernel, stride)
        sizes = [slot * HOP // stride for slot in layout.slots]
        sizes[-1] -= sum(sizes) - len(windows)
        parts = windows.split(sizes)
        return parts, [
            part[: (length - kernel) // stride + 1]
            for part, length in zip(parts, layout.num_samples, strict=True)
        ]


def _group_norm_of_linear(
    windows: list[Tensor], weight: Tensor, norm: nn.Module, blocks: Blocks | None
) -> tuple[Tensor, Tensor]:
    """Scale and shift (batch, channel) that make windows @ weight the GroupNorm (one group per channel) over each utterance, or
    over what of it is known by each block.

    With one input channel a channel's mean and variance over time follow from the mean m and the covariance S of the windows
    (time_i, 10), as w.m and w'Sw: no pass over the largest activation of the network. Statistics in float64.
    """
    assert isinstance(norm, nn.LayerNorm)
    with torch.autocast(weight.device.type, enabled=False):
        wide = [part.double() for part in windows]
        mean, product = (
            _moments(wide) if blocks is None else _moments_so_far(wide, blocks)
        )  # (batch, 10), (batch, 10, 10)
        covariance = product - mean[:, :, None] * mean[:, None, :]
        kernel = weight.double()
        variance = torch.einsum("kc,bkl,lc->bc", kernel, covariance, kernel).clamp(min=0)
        scale = norm.weight.double() * torch.rsqrt(variance + norm.eps)  # (batch, channel)
        shift = norm.bias.double() - scale * (mean @ kernel)
    return scale.to(weight.dtype), shift.to(weight.dtype)


def _moments(windows: list[Tensor]) -> tuple[Tensor, Tensor]:
    mean = torch.stack([part.mean(0) for part in windows])
    return mean, torch.stack([part.T @ part / len(part) for part in windows])


def _moments_so_far(windows: list[Tensor], blocks: Blocks) -> tuple[Tensor, Tensor]:
    kernel, stride = CONV_KERNELS[0], CONV_STRIDES[0]
    new = [
        part[(overlap - kernel) // stride + 1 if overlap else 0 :]
        for part, overlap in zip(windows, blocks.overlaps, strict=True)
    ]
    sums = [torch.cat([part.sum(0), (part.T @ part).flatten()]) for part in new]
    total = blocks.through("group_norm", _counted([len(part) for part in new], sums))
    mean, product = (total[:, 1:] / total[:, :1]).split([kernel, kernel * kernel], dim=1)
    return mean, product.unflatten(1, (kernel, kernel))


class FilterbankFrontEnd(nn.Module):
    """Log-mel filterbanks, 25 ms windows every 10 ms, two stacked per frame (Fast-HuBERT, arXiv 2309.13860, section 3.1).

    Each mel band has zero mean and unit variance over the utterance's own frames. Frame t stacks the windows at 320 t and
    320 t + 160; where the second would end beyond the utterance the first is repeated. Nothing here is learned. With `warp`, training
    sees each utterance through a vocal tract of another length (VTLP): a few voices teach what many would.
    """

    tail = 240
    has_statistics = True

    def __init__(self, config: "EncoderConfig"):
        super().__init__()
        self.dim = 2 * config.num_mels
        self.window: Tensor
        self.mel: Tensor
        self.register_buffer("window", torch.hann_window(400, periodic=False) ** 0.85, persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel_matrix(config.num_mels)), persistent=False)
        self.warped: Tensor | None  # (warps, bins, mel)
        factors = np.linspace(1 - config.warp, 1 + config.warp, WARPS).tolist() if config.warp else []
        matrices = [torch.from_numpy(mel_matrix(config.num_mels, warp=factor)) for factor in factors]
        self.register_buffer("warped", torch.stack(matrices) if matrices else None, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, layout: Layout, blocks: Blocks | None = None) -> Tensor:
        """Packed waveforms (samples,) to (frames, dim). In streaming `layout` is that of `blocks`, whose statistics go on."""
        with torch.autocast(waveforms.device.type, enabled=False):
            parts = self._log_mel(waveforms, layout, None if blocks is None else blocks.num_blocks)
        normal = (
            [_normalized(part) for part in parts] if blocks is None else _normalized_so_far(parts, blocks)
        )
        return torch.cat(
            [_stack(part, frames) for part, frames in zip(normal, layout.num_frames, strict=True)]
        )

    def add_up(self, waveforms: Tensor, blocks: Blocks) -> None:
        """Add what `forward` would to the totals of `blocks`, and compute nothing else."""
        _mel_so_far(
            [part.double() for part in self._log_mel(waveforms, blocks.layout, blocks.num_blocks)], blocks
        )

    def _log_mel(self, waveforms: Tensor, layout: Layout, num_slots: Sequence[int] | None) -> list[Tensor]:
        """Log-mel energies of each slot, (windows at 100 Hz, mel); `num_slots` of each utterance, where that is not one."""
        slots = list(zip(layout.slot_bounds, layout.num_samples, strict=True))
        if not self.training or self.warped is None:
            mel = log_mel(waveforms, self.window, self.mel)  # over the whole buffer
            starts = [first * (HOP // 160) for (first, _), _ in slots]
            return [
                mel[start : start + (length - 400) // 160 + 1]
                for start, (_, length) in zip(starts, slots, strict=True)
            ]
        each = num_slots or [1] * len(slots)
        drawn = np.repeat(
            torch.randint(WARPS, (len(each),)).numpy(), each
        ).tolist()  # one for all of an utterance
        return [
            log_mel(waveforms[HOP * first : HOP * first + length], self.window, self.warped[warp])
            for ((first, _), length), warp in zip(slots, drawn, strict=True)
        ]


class UnitFrontEnd(nn.Module):
    """Discrete units in place of audio: an embedding for each, as wide as the model."""

    tail = 0

    def __init__(self, config: "EncoderConfig"):
        super().__init__()
        assert config.num_units is not None
        self.dim = config.dim
        self.embeddings = nn.Parameter(torch.randn(config.num_units, config.dim))

    def forward(self, units: Tensor, layout: Layout) -> Tensor:
        """Units (frames,) int64, the utterances' end to end, to (frames, dim); the embeddings of several, (frames, levels), are added."""
        embedded = F.embedding(units, self.embeddings)
        return embedded if units.ndim == 1 else embedded.sum(1)


def _normalized(mel: Tensor) -> Tensor:
    """Log-mel energies (windows, mel), each band with zero mean and unit variance."""
    return (mel - mel.mean(0)) * torch.rsqrt(mel.var(0, correction=0) + 1e-5)


def _normalized_so_far(parts: list[Tensor], blocks: Blocks) -> list[Tensor]:
    """Each block's log-mel energies by the mean and the variance from the utterance's beginning to the block's end."""
    wide = [part.double() for part in parts]
    mean, square = _mel_so_far(wide, blocks)
    scale = torch.rsqrt((square - mean.square()).clamp(min=0) + 1e-5)
    return [((part - m) * s).to(parts[0].dtype) for part, m, s in zip(wide, mean, scale, strict=True)]


def _mel_so_far(parts: list[Tensor], blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Means of the log-mel energies and of their squares, (blocks, mel) each, of float64 parts (windows, mel)."""
    sums = [torch.cat([part.sum(0), part.square().sum(0)]) for part in parts]
    total = blocks.through("mel", _counted([len(part) for part in parts], sums))
    mean, square = (total[:, 1:] / total[:, :1]).chunk(2, dim=1)
    return mean, square


def _stack(mel: Tensor, frames: int) -> Tensor:
    """One utterance's normalised log-mel energies (windows, mel), two windows to a frame: (frames, 2 mel)."""
    first, second = mel[: 2 * frames : 2], mel[1 : 2 * frames : 2]
    return torch.cat([first, second if len(second) == frames else torch.cat([second, first[-1:]])], dim=1)


def log_mel(waveforms: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Kaldi-like log-mel energies (..., time, mel) of waveforms in [-1, 1]: 400-sample windows every 160, no edge padding."""
    frames = (waveforms * 32768.0).unfold(-1, 400, 160)  # (..., time, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ mel).clamp(min=1.0).log()


def mel_matrix(
    num_mels: int, low_hz: float = 20.0, high_hz: float = 8000.0, fft_size: int = 512, warp: float = 1.0
) -> np.ndarray:
    """Triangular filters (fft_size / 2 + 1, num_mels) float32, equally spaced and triangular on the mel scale 1127 ln(1 + f / 700).

    As Kaldi's. The frequencies of a spectrum are first multiplied with `warp`, as far as WARP_KNEE_HZ or what leads there, and go on in a
    straight line to 8 kHz (Jaitly & Hinton, "Vocal tract length perturbation improves speech recognition", 2013, section 3).
    """

    def to_mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(to_mel(low_hz), to_mel(high_hz), num_mels + 2)
    hertz, knee = np.arange(fft_size // 2 + 1) * 16000 / fft_size, WARP_KNEE_HZ * min(warp, 1.0)
    bins = to_mel(
        np.interp(hertz, [0.0, knee / warp, 8000.0], [0.0, knee, 8000.0]) if warp != 1.0 else hertz
    )[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
