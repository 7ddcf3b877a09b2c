"""Recordings too long for one attention: overlapping windows, as in the pipeline of transformers.

A window is computed with a sixth of its size on each side, which is dropped. Attention is limited to the
window, so the result can differ from that of the whole. Normalisation over time (waveform, group norm of
BASE, mel bands) uses the statistics of the whole recording (pretrain/model/totals.py).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.data.utterance import HOP, SAMPLE_RATE, num_frames
from pretrain.data.windows import overlapping_windows

CONTEXT = 1 / 6  # of a window, on each side


def in_windows(
    loaded: np.ndarray,
    max_seconds: float,
    batch_seconds: float,
    forward: Callable[[list[np.ndarray]], list[Tensor]],
) -> Tensor:
    """Returns the log probabilities (frames, classes) of one long recording, from windows of at most
    `max_seconds`.

    `loaded` is a waveform (samples,) float32 or units (frames, …). `forward` gets several windows at once, of
    at most `batch_seconds` together, but always one.
    """
    is_audio = loaded.dtype == np.float32
    frames = num_frames(len(loaded)) if is_audio else len(loaded)
    windows = overlapping_windows(frames, int(max_seconds * SAMPLE_RATE) // HOP, CONTEXT)
    at_once = max(1, int(batch_seconds / max_seconds))
    parts: list[Tensor] = []
    for number in range(0, len(windows), at_once):
        batch = windows[number : number + at_once]
        inputs = [
            window.samples(loaded, frames) if is_audio else loaded[window.first : window.last]
            for window in batch
        ]
        parts += [part[window.kept] for part, window in zip(forward(inputs), batch, strict=True)]
    return torch.cat(parts)
