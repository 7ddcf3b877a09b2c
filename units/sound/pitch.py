"""Pitch on the grid of the mel frames, and what a pitch looks like in a mel spectrogram.

Units hardly know the pitch, and a decoder that must guess it paints the mean over all pitches: a whisper. So
the synthesizer gets it in training as measured here, and learns to predict a plausible one.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pretrain.data.utterance import SAMPLE_RATE, num_frames
from units.sound.griffin_lim import MARGIN, MEL_HOP, NUM_MELS, PER_FRAME, log_mel, num_samples

LOWEST_HZ, HIGHEST_HZ = 60.0, 400.0
VOICED = 0.5  # of the autocorrelation's peak, 1 for a periodic sound
# of the peak for each octave below the highest pitch: a period's multiples are periods, too
OCTAVE_COST = 0.02
# for this every second sample, the mean of two, is enough and takes a quarter of the time
_RATE = SAMPLE_RATE // 2
_WINDOW = 512  # of those: 64 ms
_PITCHES = 128  # that patterns are tabulated for, equally spaced in octaves: steps of 2 %


def pitch(waveform: np.ndarray) -> Tensor:
    """Fundamental frequency in Hz of each mel frame, 0 where unvoiced: (2 frames,) float32 of a waveform at
    16 kHz.

    The highest peak of the autocorrelation of 64 ms, windowed, over that of the window (Boersma 1993,
    equations 8 and 9, without his search for a path); a median over five mel frames removes single errors.
    """
    frames = num_frames(len(waveform))
    signal = np.asarray(waveform[: num_samples(frames)], np.float32).reshape(-1, 2).mean(axis=1)
    sides = (_WINDOW + MARGIN - MEL_HOP) // 2  # mel frame j is centred on sample 160 j + 120
    windows = torch.from_numpy(np.pad(signal, sides)).unfold(0, _WINDOW, MEL_HOP // 2)[: PER_FRAME * frames]
    shape = torch.hann_window(_WINDOW)
    windows = (windows - windows.mean(1, keepdim=True)) * shape
    first, last = int(_RATE / HIGHEST_HZ), int(_RATE / LOWEST_HZ)
    correlation = _autocorrelation(windows)
    own = _autocorrelation(shape)
    energy = correlation[:, :1].clamp(min=1e-9)
    normalised = correlation[:, : last + 2] / energy / (own / own[0])[: last + 2]
    inner = normalised[:, first : last + 1]
    peak = (inner >= normalised[:, first - 1 : last]) & (inner >= normalised[:, first + 1 : last + 2])
    lags = torch.arange(first, last + 1)
    score = torch.where(peak, inner - OCTAVE_COST * (lags / first).log2(), -1.0)
    best = score.argmax(1)
    strength = inner.gather(1, best[:, None])[:, 0]
    heard = (score.amax(1) > -1) & (strength > VOICED) & (windows.square().mean(1) > 1e-8)
    before, at, after = normalised.gather(1, (first + best)[:, None] + torch.tensor([-1, 0, 1])).unbind(1)
    # the top of the parabola through the three
    beside = 0.5 * (before - after) / (before - 2 * at + after).clamp(max=-1e-9)
    found = torch.where(heard, _RATE / (lags[best] + beside.clamp(-0.5, 0.5)), 0.0)
    padded = torch.nn.functional.pad(found[None, None], (2, 2), mode="replicate")[0, 0]
    return padded.unfold(0, 5, 1).median(1).values


def _autocorrelation(x: Tensor) -> Tensor:
    """Of lags up to 135 samples, more than the longest period: (..., 136)."""
    spectrum = torch.fft.rfft(x, 648)  # _WINDOW and the lags, so that nothing comes round
    return torch.fft.irfft(spectrum.real.square() + spectrum.imag.square(), 648)[..., :136]


def patterns(frequencies: Tensor) -> Tensor:
    """What harmonics add to log mel magnitudes: (..., 80) of frequencies (...) in Hz, 0 where unvoiced.

    The log mel magnitudes of a pulse train of this pitch, relative to those of the other pitches: where the
    bands are narrower than the distance of two harmonics a comb, above them nothing.
    """
    table = _table().to(frequencies.device)
    place = (
        (frequencies.clamp(LOWEST_HZ, HIGHEST_HZ) / LOWEST_HZ).log2()
        / np.log2(HIGHEST_HZ / LOWEST_HZ)
        * (_PITCHES - 1)
    )
    lower = place.floor().clamp(max=_PITCHES - 2).long()
    share = (place - lower)[..., None]
    pattern = table[lower] * (1 - share) + table[lower + 1] * share
    return torch.where((frequencies > 0)[..., None], pattern, 0.0)


@cache
def _table() -> Tensor:
    """(pitches, 80)."""
    rows = []
    octaves = np.log2(HIGHEST_HZ / LOWEST_HZ)
    for frequency in LOWEST_HZ * 2 ** np.linspace(0, octaves, _PITCHES):
        seconds = np.arange(num_samples(8)) / SAMPLE_RATE
        harmonics = np.arange(1, int(SAMPLE_RATE / 2 / frequency) + 1)
        train = np.cos(2 * np.pi * frequency * harmonics[:, None] * seconds).sum(0) / len(harmonics)
        rows.append(log_mel(train.astype(np.float32))[4:12].mean(0))  # away from the edges
    table = torch.stack(rows).clamp(min=-4.0)
    assert table.shape == (_PITCHES, NUM_MELS)
    return table - table.mean(0)
