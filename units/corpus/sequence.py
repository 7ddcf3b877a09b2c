"""Frames to units and back: a unit is a run of equal labels together with its duration in frames.

Deduplication is lossless: `expand(*deduplicate(frames))` gives the frames back bit for bit.
"""

import numpy as np

MAX_DURATION = 2**16 - 1


def deduplicate(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal labels: units (units,) in the dtype of `frames` and durations uint16 (units,) in frames.

    Of several levels, frames (frames, levels), units (units, levels): frames are equal where all of their
    levels are. A run longer than 65535 frames (22 minutes at 50 Hz) becomes several units of the same label,
    so that no duration is lost.
    """
    if not len(frames):
        return frames[:0], np.zeros(0, np.uint16)
    changes = frames[1:] != frames[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes if frames.ndim == 1 else changes.any(1)) + 1])
    lengths = np.diff(starts, append=len(frames))
    if lengths.max() > MAX_DURATION:
        pieces = -(-lengths // MAX_DURATION)
        starts = np.repeat(starts, pieces)
        # every piece of a run but its last
        rest = np.repeat(np.cumsum(pieces) - 1, pieces) != np.arange(pieces.sum())
        lengths = np.where(rest, MAX_DURATION, np.repeat(lengths - (pieces - 1) * MAX_DURATION, pieces))
    return frames[starts], lengths.astype(np.uint16)


def expand(units: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """The frames (sum of durations,) or (sum of durations, levels) that `deduplicate` was given."""
    return np.repeat(units, durations, axis=0)
