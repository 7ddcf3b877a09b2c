"""Recordings too long for one attention: windows that overlap by a third, and of each overlap the outer halves dropped.

Attention sees a window only, so that what is found can differ from what the whole would give. What is normalised over time (the
waveform, BASE's group norm, mel bands) is normalised by the statistics of the whole recording (pretrain/model/totals.py).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.data.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, num_frames

CONTEXT = 1 / 6  # of a window, on each side, that is seen and dropped; transformers' pipeline has the same


def in_windows(
    loaded: np.ndarray,
    max_seconds: float,
    batch_seconds: float,
    forward: Callable[[list[np.ndarray]], list[Tensor]],
) -> Tensor:
    """The log probabilities (frames, classes) of one long recording, from windows of at most `max_seconds`.

    `loaded` is a waveform (samples,) float32 or units (frames, …); `forward` gives what it is asked of several at once, which are no
    more than `batch_seconds` together, but one.
    """
    is_audio = loaded.dtype == np.float32
    frames = num_frames(len(loaded)) if is_audio else len(loaded)
    windows = plan_windows(frames, int(max_seconds * SAMPLE_RATE) // HOP)
    parts = []
    at_once = max(1, int(batch_seconds / max_seconds))
    for number in range(0, len(windows), at_once):
        batch = windows[number : number + at_once]
        cut = []
        for first, last, _, _ in batch:
            stop = len(loaded) if last == frames else (last - 1) * HOP + MIN_SAMPLES
            cut.append(loaded[first * HOP : stop] if is_audio else loaded[first:last])
        found = forward(cut)
        parts += [
            part[begin - first : end - first]
            for part, (first, _, begin, end) in zip(found, batch, strict=True)
        ]
    return torch.cat(parts)


def plan_windows(frames: int, size: int) -> list[tuple[int, int, int, int]]:
    """Windows [first, last) of at most `size` frames of a recording, and the frames [begin, end) that are taken from each.

    What is taken covers each frame once; beside it a window sees a sixth of its size on both sides, but at the ends.
    """
    if frames <= size:
        return [(0, frames, 0, frames)]
    context = int(size * CONTEXT)
    windows, begin, first = [], 0, 0
    while first + size < frames:
        end = first + size - context
        windows.append((first, first + size, begin, end))
        begin, first = end, end - context
    return [*windows, (first, frames, begin, frames)]
