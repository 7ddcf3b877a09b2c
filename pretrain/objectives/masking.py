"""Span masks over frames (wav2vec 2.0, section 3.1)."""

import numpy as np


def span_mask(
    num_frames: int, start_probability: float, span_length: int, rng: np.random.Generator, min_spans: int = 2
) -> np.ndarray:
    """Boolean mask (num_frames,): round(p T) starts drawn without replacement, each masking `span_length` frames; spans may overlap.

    At least `min_spans` spans, as fairseq; an utterance shorter than two spans is masked with spans of a quarter of its length,
    and where spans happen to cover everything one frame is taken back, so that something is masked and something is left.
    Counts differ between utterances: nothing is trimmed to the shortest.
    """
    length = span_length if num_frames >= 2 * span_length else max(1, num_frames // 4)
    places = num_frames - length + 1
    count = min(max(min_spans, int(start_probability * num_frames + rng.random())), places)
    mask = np.zeros(num_frames, dtype=bool)
    if num_frames < 2:
        return mask
    for start in rng.choice(places, count, replace=False):
        mask[start : start + length] = True
    if mask.all():
        mask[rng.integers(num_frames)] = False
    return mask
