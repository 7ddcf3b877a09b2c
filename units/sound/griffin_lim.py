"""Log-mel spectrograms on the frame grid, and sound from them without a trained vocoder: fast Griffin-Lim.

Two mel frames belong to each 20 ms frame of the units: a hop of 160 samples (10 ms), windows of 40 ms, mel
frame j centred on sample 160 j + 120, so that those of frame t lie 40 samples on either side of the quarters
of the 20 ms in the middle of its window. `frames` frames of 20 ms are 320 frames + 80 samples of sound, the
fewest that have so many, and 2 frames mel frames.

What a mel spectrogram does not tell is lost: fine structure above some 1.5 kHz, and phase, which is found
again only so that neighbouring windows agree. The result is intelligible and metallic.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pretrain.data.utterance import HOP, MIN_SAMPLES, num_frames
from pretrain.model.frontend import mel_matrix

MEL_HOP = 160  # samples
NUM_MELS = 80
PER_FRAME = HOP // MEL_HOP  # mel frames in a frame of the units
FLOOR = 1e-3  # of a mel magnitude: 100 dB below a sine at full scale
ITERATIONS = 32

_FFT, _WINDOW = 1024, 640
# samples of silence on both sides: then torch's windows, but the first and last, are centred right
MARGIN = (MIN_SAMPLES - HOP) // 2
_NONNEGATIVE_STEPS = 30


def num_samples(frames: int) -> int:
    """The fewest samples that have so many frames of 20 ms: 320 frames + 80."""
    return HOP * (frames - 1) + MIN_SAMPLES


def log_mel(waveform: np.ndarray) -> Tensor:
    """Log mel magnitudes (2 frames, 80) float32 of a waveform at 16 kHz, `frames` being its frames of 20 ms;
    at least one."""
    frames = num_frames(len(waveform))
    assert frames, "audio shorter than a frame is refused where it is indexed"
    signal = torch.from_numpy(np.ascontiguousarray(waveform[: num_samples(frames)], np.float32))
    magnitudes = _stft(torch.nn.functional.pad(signal, (MARGIN, MARGIN))).abs()[:, 1:-1]  # (513, 2 frames)
    return (magnitudes.T @ _mel()).clamp(min=FLOOR).log()


def to_waveform(
    mel: Tensor, iterations: int = ITERATIONS, momentum: float = 0.99, seed: int = 0
) -> np.ndarray:
    """Sound of log mel magnitudes (2 frames, 80): float32 (320 frames + 80,) at 16 kHz, a function of its
    arguments alone."""
    if mel.ndim != 2 or mel.shape[1] != NUM_MELS or not len(mel) or len(mel) % PER_FRAME:
        raise ValueError(f"a log-mel spectrogram is (2 frames, {NUM_MELS}), not {tuple(mel.shape)}")
    magnitudes = linear_magnitudes(mel).T  # (513, 2 frames)
    # torch's first and last window, half beyond
    edges = torch.cat([magnitudes[:, :1], magnitudes, magnitudes[:, -1:]], dim=1)
    signal = griffin_lim(edges, iterations, momentum, seed)
    sound: np.ndarray = signal[MARGIN:-MARGIN].numpy()
    return sound


def linear_magnitudes(mel: Tensor) -> Tensor:
    """Non-negative magnitudes (time, 513) whose mel sums are those of log mel magnitudes (time, 80), in the
    sense of least squares.

    From the pseudo-inverse, cut off at zero, by multiplicative updates, which stay non-negative and never
    raise the squared error (Lee & Seung 2001, theorem 1, with one factor fixed).
    """
    wanted = mel.float().exp()
    matrix, inverse = _mel(), _mel_inverse()
    magnitudes = (wanted @ inverse).clamp(min=1e-6)
    numerator = wanted @ matrix.T
    gram = matrix @ matrix.T
    for _ in range(_NONNEGATIVE_STEPS):
        magnitudes = magnitudes * numerator / (magnitudes @ gram).clamp(min=1e-9)
    return magnitudes


def griffin_lim(
    magnitudes: Tensor, iterations: int = ITERATIONS, momentum: float = 0.99, seed: int = 0
) -> Tensor:
    """A signal (160 (time - 1),) whose spectrogram is near `magnitudes` (513, time), in windows centred on
    multiples of 160.

    Fast Griffin-Lim (Perraudin, Balazs & Søndergaard 2013, algorithm 2): projections onto spectrograms of
    signals and onto those of these magnitudes in turn, with `momentum` (their α; 0 is Griffin & Lim 1984),
    from random phases drawn with `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    length = MEL_HOP * (magnitudes.shape[1] - 1)
    phases = torch.polar(
        torch.ones_like(magnitudes), 2 * np.pi * torch.rand(magnitudes.shape, generator=generator)
    )
    previous = torch.zeros_like(phases)
    for _ in range(iterations):
        consistent = _stft(_istft(magnitudes * phases, length))
        ahead = consistent + momentum * (consistent - previous)
        phases, previous = ahead / ahead.abs().clamp(min=1e-12), consistent
    return _istft(magnitudes * phases, length)


def spectral_convergence(signal: Tensor, magnitudes: Tensor) -> float:
    """How far the spectrogram of `signal` is from `magnitudes` (513, time): the norm of the difference over
    the norm of `magnitudes`."""
    return float((_stft(signal).abs() - magnitudes).norm() / magnitudes.norm())


def _stft(signal: Tensor) -> Tensor:
    return torch.stft(
        signal, _FFT, MEL_HOP, _WINDOW, _window(), center=True, pad_mode="constant", return_complex=True
    )


def _istft(spectrum: Tensor, length: int) -> Tensor:
    return torch.istft(spectrum, _FFT, MEL_HOP, _WINDOW, _window(), center=True, length=length)


@cache
def _window() -> Tensor:
    return torch.hann_window(_WINDOW)


@cache
def _mel() -> Tensor:
    return torch.from_numpy(mel_matrix(NUM_MELS, fft_size=_FFT))  # (513, 80)


@cache
def _mel_inverse() -> Tensor:
    return torch.linalg.pinv(_mel().double()).float()  # (80, 513)
