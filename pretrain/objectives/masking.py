"""Span masks over frames (wav2vec 2.0, section 3.1)."""

import numpy as np


def span_mask(
    num_frames: int, start_probability: float, span_length: int, rng: np.random.Generator, min_spans: int = 2
) -> np.ndarray:
    """Boolean mask (num_frames,): round(p T) starts drawn without replacement, each of `span_length` frames.

    Spans may overlap. There are at least `min_spans`, as in fairseq; the spans of an utterance shorter than
    two of them have a quarter of its length. Where spans cover everything one frame is unmasked, so that some
    frames are masked and some are not. Counts differ between utterances: nothing is trimmed to the shortest.
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
