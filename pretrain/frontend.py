"""Front ends: waveform (batch, samples) at 16 kHz to one frame per 320 samples.

Both give floor((n - 400) / 320) + 1 frames for n samples, whatever the padding, and a frame depends on its utterance alone.
Activations are (batch, time, channel): a strided convolution is then a matrix product over a view.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from pretrain.encoder import EncoderConfig

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)

Count = TypeVar("Count", int, Tensor)


def num_frames(num_samples: Count) -> Count:
    """Frames of `num_samples` samples (int or tensor), exact for 400 samples and more."""
    return (num_samples - 400) // 320 + 1


class WaveformFrontEnd(nn.Module):
    """wav2vec 2.0's seven convolutions. `conv_norm = "group"`: per-channel statistics over time after the first one (BASE);
    `"layer"`: LayerNorm after each (LARGE)."""

    def __init__(self, config: "EncoderConfig"):
        super().__init__()
        self.dim = config.conv_dim
        self.group_norm = config.conv_norm == "group"
        inputs = [1] + [config.conv_dim] * (len(CONV_KERNELS) - 1)
        # (kernel, in, out): tap-major, so that a product over stacked rows is a plain matrix product.
        self.weights = nn.ParameterList(
            nn.init.normal_(torch.empty(kernel, channels, config.conv_dim), std=(2 / (kernel * channels)) ** 0.5)
            for kernel, channels in zip(CONV_KERNELS, inputs, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(config.conv_dim) for _ in CONV_KERNELS) if config.conv_bias else None
        self.norms = nn.ModuleList(nn.LayerNorm(config.conv_dim) for _ in range(1 if self.group_norm else len(CONV_KERNELS)))

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        x = self._first(waveforms, num_samples)
        for layer in range(1, len(CONV_KERNELS)):
            x = strided_conv(F.gelu(x), self.weights[layer])  # (batch, time, channel)
            x = x if self.biases is None else x + self.biases[layer]
            x = x if self.group_norm else self.norms[layer](x)
        return F.gelu(x)

    def _first(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        windows = waveforms.unfold(1, CONV_KERNELS[0], CONV_STRIDES[0])  # (batch, time, 10)
        weight = self.weights[0].squeeze(1)  # (10, channel)
        if self.group_norm:
            scale, shift = _group_norm_of_linear(windows, (num_samples - 10) // 5 + 1, weight, self.norms[0])
            return torch.baddbmm(shift[:, None, :].to(windows.dtype), windows, weight * scale[:, None, :].to(weight.dtype))
        x = windows @ weight
        return self.norms[0](x if self.biases is None else x + self.biases[0])


def _group_norm_of_linear(windows: Tensor, lengths: Tensor, weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (batch, channel) that make windows @ weight the GroupNorm (one group per channel) over valid windows.

    With one input channel a channel's mean and variance over time follow from the mean m and the covariance S of the windows,
    as w.m and w'Sw: no pass over the largest activation of the network. Statistics in float64.
    """
    assert isinstance(norm, nn.LayerNorm)
    with torch.autocast(windows.device.type, enabled=False):
        valid = torch.arange(windows.shape[1], device=windows.device) < lengths[:, None]
        masked = windows.double() * valid[..., None]  # (batch, time, 10)
        count = lengths[:, None].double()
        mean = masked.sum(1) / count  # (batch, 10)
        covariance = masked.transpose(1, 2) @ masked / count[..., None] - mean[:, :, None] * mean[:, None, :]
        wide = weight.double()
        variance = torch.einsum("kc,bkl,lc->bc", wide, covariance, wide).clamp(min=0)
        scale = norm.weight.double() * torch.rsqrt(variance + norm.eps)  # (batch, channel)
        shift = norm.bias.double() - scale * (mean @ wide)
    return scale.float(), shift.float()


def strided_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with stride 2 and kernel 2 or 3: x (batch, time, in), weight (kernel, in, out) -> (batch, frames, out)."""
    kernel, channels, _ = weight.shape
    frames = (x.shape[1] - kernel) // 2 + 1
    pairs = x[:, : 2 * frames].unflatten(1, (frames, 2)).flatten(2)  # (batch, frames, 2 in), a view
    y = pairs @ weight[:2].reshape(2 * channels, -1)
    return y if kernel == 2 else y + x[:, 2 : 2 * frames + 1 : 2] @ weight[2]


class FilterbankFrontEnd(nn.Module):
    """Log-mel filterbanks, 25 ms windows every 10 ms, two stacked per frame (Fast-HuBERT, arXiv 2309.13860, section 3.1).

    Each mel band has zero mean and unit variance over the utterance's own frames. Frame t stacks the windows at 320 t and
    320 t + 160; where the second would end beyond the utterance the first is repeated. Nothing here is learned.
    """

    def __init__(self, config: "EncoderConfig"):
        super().__init__()
        self.dim = 2 * config.num_mels
        self.window: Tensor
        self.mel: Tensor
        self.register_buffer("window", torch.hann_window(400, periodic=False) ** 0.85, persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel_matrix(config.num_mels)), persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        with torch.autocast(waveforms.device.type, enabled=False):
            mel = log_mel(waveforms, self.window, self.mel)  # (batch, time, mel), 100 Hz
        lengths = (num_samples - 400) // 160 + 1
        valid = (torch.arange(mel.shape[1], device=mel.device) < lengths[:, None])[..., None]
        mean = (mel * valid).sum(1, keepdim=True) / lengths[:, None, None]
        variance = ((mel - mean).square() * valid).sum(1, keepdim=True) / lengths[:, None, None]
        mel = (mel - mean) * torch.rsqrt(variance + 1e-5)
        frames = num_frames(waveforms.shape[1])
        first = 2 * torch.arange(frames, device=mel.device)
        second = torch.minimum((first + 1).expand(len(mel), -1), (lengths - 1)[:, None]).clamp(min=0)  # (batch, frames)
        return torch.cat([mel[:, first], mel.gather(1, second[..., None].expand(-1, -1, mel.shape[2]))], dim=2)


def log_mel(waveforms: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Kaldi-like log-mel energies (batch, time, mel) of waveforms in [-1, 1]: 400-sample windows every 160, no edge padding."""
    frames = (waveforms * 32768.0).unfold(1, 400, 160)  # (batch, time, 400)
    frames = frames - frames.mean(2, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ mel).clamp(min=1.0).log()


def mel_matrix(num_mels: int, low_hz: float = 20.0, high_hz: float = 8000.0) -> np.ndarray:
    """Triangular filters (257, num_mels) float32, equally spaced and triangular on the mel scale 1127 ln(1 + f / 700), as Kaldi."""

    def to_mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(to_mel(low_hz), to_mel(high_hz), num_mels + 2)
    bins = to_mel(np.arange(257) * 16000 / 512)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
