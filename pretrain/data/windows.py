"""Windows of utterances that are too long for one attention: the frames computed, and those of them that are
kept."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pretrain.data.utterance import HOP, MIN_SAMPLES


class Window(NamedTuple):
    """Frames `start` to `end` of an utterance, computed from its frames `first` to `last`. Ends are
    exclusive."""

    first: int
    last: int
    start: int
    end: int

    @property
    def kept(self) -> slice:
        """The frames to keep, among those computed."""
        return slice(self.start - self.first, self.end - self.first)

    def samples(self, waveform: np.ndarray, num_frames: int) -> np.ndarray:
        """The samples of a waveform of `num_frames` that give the frames `first` to `last`."""
        stop = len(waveform) if self.last == num_frames else (self.last - 1) * HOP + MIN_SAMPLES
        return waveform[self.first * HOP : stop]


def equal_windows(num_frames: int, longest: int, context: int) -> list[Window]:
    """Equal parts of at most `longest` frames, each computed with `context` frames more on both sides."""
    count = -(-num_frames // longest)
    bounds = pairwise([num_frames * part // count for part in range(count + 1)])
    return [
        Window(max(0, start - context), min(num_frames, end + context), start, end) for start, end in bounds
    ]


def overlapping_windows(num_frames: int, size: int, context: float) -> list[Window]:
    """Windows of `size` frames; the share `context` of it on each inner side is computed and dropped."""
    dropped = int(size * context)
    windows, start, first = [], 0, 0
    while first + size < num_frames:
        end = first + size - dropped
        windows.append(Window(first, first + size, start, end))
        start, first = end, end - dropped
    return [*windows, Window(first, num_frames, start, num_frames)]
