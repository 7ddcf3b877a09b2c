"""How many labels or units a recording may have: the one rule that labels and the unit files of other tools
are checked by.

A frame every 1 / rate seconds and a window of 25 ms make floor((n - 400) / hop) + 1 frames of n samples at 16
kHz. Labels have so many, give or take one. Other tools pad, cut and round in their own ways, which
`count_bounds` allows for.
"""

import numpy as np

from pretrain.data.utterance import MIN_SAMPLES, SAMPLE_RATE

SLACK = 1  # frames: a tool that pads or cuts by half a window has one more or fewer
# fairseq's and textlesslib's HuBERT readers cut here, and each cut loses the frame across it
CHUNK = 100 * SAMPLE_RATE
COMMON_RATES_HZ = (
    12.5,
    25.0,
    40.0,
    50.0,
    75.0,
    86.1328125,
    100.0,
)  # HuBERT, its 25 Hz descendants, MFCC, common codecs


def count_frames(num_samples: int, rate_hz: float) -> int:
    """Frames at `rate_hz` of a recording of `num_samples` at 16 kHz, by the rule of
    `pretrain.data.utterance.num_frames`, which is that of 50 Hz."""
    return max(0, int((num_samples - MIN_SAMPLES) * rate_hz // SAMPLE_RATE) + 1)


def count_bounds(num_samples: int, rate_hz: float) -> tuple[int, int]:
    """The fewest and the most frames at `rate_hz` that a tool may make of a whole recording of `num_samples`
    at 16 kHz.

    The fewest: windows without padding, one lost for each 100 s, and one of slack. The most: one of slack, or
    where that is more the whole and broken hops, which codecs make by padding the last. A recording that was
    cut at a longest length does not pass: its units would be taken for all of it.
    """
    frames = count_frames(num_samples, rate_hz)
    fewest = frames - SLACK - num_samples // CHUNK
    whole_hops = -int(-num_samples * rate_hz // SAMPLE_RATE)
    return max(0, fewest), max(frames + SLACK, whole_hops)


def differing(have: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """Places of the utterances whose labels `have` (utterances,) are not as many as their frames, give or
    take one."""
    return np.flatnonzero(np.abs(have - num_frames) > SLACK)


def likely_rate(num_frames: int, num_samples: int) -> float | None:
    """The common frame rate in Hz that makes so many frames of so many samples at 16 kHz, within 6 %; None if
    there is none."""
    rate = num_frames * SAMPLE_RATE / max(1, num_samples)
    nearest = min(COMMON_RATES_HZ, key=lambda common: abs(common - rate))
    return nearest if abs(nearest - rate) <= 0.06 * nearest else None
