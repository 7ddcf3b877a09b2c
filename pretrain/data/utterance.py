"""Utterances, and the encoder's frames.

Frames are 400-sample windows (25 ms) every 320 samples (20 ms) at 16 kHz, so frame t is centred on t * 20 +
12.5 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.data.decoding.spans import Member

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
HOP = 320


def num_frames(num_samples: int) -> int:
    """50 Hz frames of `num_samples` at 16 kHz: floor((n - 400) / 320) + 1, and 0 below 400 samples."""
    return (num_samples - MIN_SAMPLES) // HOP + 1 if num_samples >= MIN_SAMPLES else 0


class Phone(NamedTuple):
    """One phone of an alignment, in seconds from the utterance's start."""

    start: float
    end: float
    phone: str


class Word(NamedTuple):
    """One word of an alignment, in seconds from the utterance's start."""

    start: float
    end: float
    word: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row of a manifest: where its samples are, and its annotations. `start` and `num_samples` count at
    `sample_rate`.

    In a tar at `path`, the recording is the `member_size` bytes from `member_offset`.
    """

    id: str
    path: str
    start: int
    num_samples: int
    sample_rate: int
    split: str | None = None
    speaker: str | None = None
    text: str | None = None
    phones: list[Phone] | None = None
    member_offset: int | None = None
    member_size: int | None = None
    words: list[Word] | None = None

    @property
    def member(self) -> Member | None:
        """Where the recording lies in the tar at `path`; None for a file of its own."""
        if self.member_offset is None or self.member_size is None:
            return None
        return Member(self.member_offset, self.member_size)

    @property
    def length(self) -> int:
        """Samples at 16 kHz."""
        return self.num_samples * SAMPLE_RATE // self.sample_rate

    @property
    def num_frames(self) -> int:
        """50 Hz frames."""
        return num_frames(self.length)


def phone_frames(phones: Sequence[Phone], num_frames: int) -> np.ndarray:
    """The phone at the centre of each frame's window, (num_frames,) of str, "" where there is none.

    `phones` are (start, end, phone) in seconds, in order and without overlap; a phone covers start <= t <
    end.
    """
    if not phones:
        return np.full(num_frames, "")
    starts, ends, names = (np.array(column) for column in zip(*phones, strict=True))
    centres = (np.arange(num_frames) * HOP + MIN_SAMPLES // 2) / SAMPLE_RATE
    # the last phone that has begun; -1 before the first
    last = np.searchsorted(starts, centres, side="right") - 1
    return np.where((last >= 0) & (centres < ends[last]), names[last], "")
