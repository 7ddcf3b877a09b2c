"""MFCC, the features of HuBERT's first targets."""

import kaldi_native_fbank
import numpy as np

from pretrain.data.utterance import SAMPLE_RATE

NUM_CEPSTRA = 13


def mfcc(waveform: np.ndarray, cmvn: bool = False) -> np.ndarray:
    """MFCC + Δ + ΔΔ at 50 Hz: (num_frames(samples), 39) float32 of a float32 waveform in [-1, 1] at 16 kHz.

    HuBERT's first targets (Hsu et al. 2021, section IV-B; fairseq `dump_mfcc_feature.py`): Kaldi's 13 MFCC
    from 23 mel bins with snip_edges, c0 rather than energy, no dither, samples not scaled to 16 bits; Δ over
    5 frames, edges repeated. Kaldi frame 2t spans the 400 samples of convolution frame t, so every second
    frame is kept. `cmvn` normalises mean and variance of the 13 over the utterance before Δ, as Kaldi recipes
    do and HuBERT does not.
    """
    options = kaldi_native_fbank.MfccOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.num_ceps = NUM_CEPSTRA
    options.use_energy = False
    computer = kaldi_native_fbank.OnlineMfcc(options)
    computer.accept_waveform(SAMPLE_RATE, waveform)
    computer.input_finished()
    # (frames at 100 Hz, 13)
    static = np.stack([computer.get_frame(t) for t in range(computer.num_frames_ready)])
    if cmvn:
        static = (static - static.mean(axis=0)) / np.maximum(static.std(axis=0), 1e-5)
    first = deltas(static)
    return np.ascontiguousarray(np.hstack([static, first, deltas(first)])[::2])


def deltas(features: np.ndarray) -> np.ndarray:
    """Regression slope over 5 frames, Σ n·x[t+n] / Σ n² for n = -2…2, with the edge frames repeated. (frames,
    dim)"""
    padded = np.pad(features, ((2, 2), (0, 0)), mode="edge")
    slopes: np.ndarray = (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / np.float32(10)
    return slopes
