"""Forced alignment: the frames in which a recogniser emits a known text, and the times of its phones and
words.

The best path of CTC's lattice (Graves et al., 2006, with a maximum in place of the sum): states are the
symbols with a blank before, between and after them, a frame is spent in each state entered, and only a blank
between two different symbols may be left out.

Times: frame t is computed from samples 320 t to 320 t + 400 and stands for the 20 ms around the middle of
that window, as it does in `pretrain.data.audio.phone_frames`. CTC emits a symbol in a frame or two and blanks
around it, so a span alone is much shorter than what it stands for. `word_times` therefore lets each word or
phone reach into the blanks (and the space between words) beside it: half way to its neighbour, yet no further
than `reach_seconds`, so that a pause stays a pause.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pretrain.ctc.vocabulary import BLANK, Vocabulary
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE, Word
from pretrain.store.disk import atomic_path

# On the dev voices of synthetic speech, whose times are known: of 0 to 0.15 s the one that is nearly best for
# words (0.02 to 0.04) and for phones (0.06 to 0.1) alike, by the share of frames in the right one.
REACH_SECONDS = 0.06


class Span(NamedTuple):
    """Frames [start, end) in which a symbol is emitted, and its mean log probability in them."""

    start: int
    end: int
    score: float


def forced_alignment(log_probs: Tensor, classes: np.ndarray) -> list[Span]:
    """A span for each of `classes` (symbols,) int64, on the most probable path through `log_probs` (frames,
    classes).

    Sums are float64, and (frames, 2 symbols + 1) bytes of memory hold the way back. Of equally good paths the
    one is taken that, read from the end, stays longest where it is. Classes that do not fit the frames, or
    that no path of these probabilities spells, are a ValueError.
    """
    emissions = log_probs.detach().cpu().double().numpy()
    num_frames, num_classes = emissions.shape
    if not len(classes):
        return []
    if classes.min() <= BLANK or classes.max() >= num_classes:
        raise ValueError(
            f"classes to align must be 1 to {num_classes - 1}, and go from {classes.min()} to {classes.max()}"
        )
    needed = len(classes) + int((classes[1:] == classes[:-1]).sum())  # a blank between two of the same
    if needed > num_frames:
        raise ValueError(
            f"{len(classes)} symbols, which need {needed} frames, do not fit {num_frames} frames"
        )
    path = _best_path(emissions, classes)
    (where,) = np.nonzero(path % 2)  # frames of symbols, in order
    symbols = path[where] // 2
    starts, ends = (np.searchsorted(symbols, np.arange(len(classes)), side) for side in ("left", "right"))
    scores = emissions[where, classes[symbols]]
    return [
        Span(int(where[first]), int(where[last - 1]) + 1, float(scores[first:last].mean()))
        for first, last in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _best_path(emissions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The state in each frame, (frames,) int64: 2 n + 1 is symbol n, even numbers are the blanks beside."""
    num_frames, num_states = len(emissions), 2 * len(classes) + 1
    states = np.full(num_states, BLANK)
    states[1::2] = classes
    barred = np.full(num_states, -np.inf)  # added to what comes from two states before
    barred[3::2][classes[1:] != classes[:-1]] = 0.0
    best = np.full(num_states + 2, -np.inf)  # two states before the first, which nothing comes from
    best[2:4] = emissions[0, states[:2]]
    back = np.zeros((num_frames, num_states), np.int8)
    skip = np.empty(num_states)
    for frame in range(1, num_frames):
        stay, step = best[2:], best[1:-1]
        np.add(best[:-2], barred, out=skip)
        moved = step > stay
        chosen = np.where(moved, step, stay)
        skipped = skip > chosen
        back[frame] = np.where(skipped, 2, moved)
        best[2:] = np.where(skipped, skip, chosen) + emissions[frame, states]
    last = num_states - 1 - int(best[-2] >= best[-1])
    if not np.isfinite(best[2 + last]):
        raise ValueError(
            "no path through these log probabilities spells the classes: they hold NaN, or -inf where a "
            "symbol must be"
        )
    path = np.empty(num_frames, np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = last
        last -= int(back[frame, last])  # an int8 would wrap around
    return path


def stretch(
    spans: Sequence[tuple[int, int]], num_frames: int, reach_seconds: float = REACH_SECONDS
) -> list[tuple[float, float]]:
    """Seconds of spans of frames [start, end), in order, after each has reached into the gaps beside it.

    Two share a gap evenly; before the first and after the last one there is all of it to take. No further
    than `reach_seconds` in either direction: 0 leaves the spans as they are, infinity leaves no gaps.
    """
    reach = reach_seconds * SAMPLE_RATE / HOP
    edges = [0.0, *((left[1] + right[0]) / 2 for left, right in pairwise(spans)), float(num_frames)]
    return [
        (_seconds(max(start - reach, before)), _seconds(min(end + reach, after)))
        for (start, end), (before, after) in zip(spans, pairwise(edges), strict=True)
    ]


def _seconds(frame: float) -> float:
    """When the time that a frame stands for begins: half a hop before the middle of its window, and at 0 for
    the first."""
    return (HOP * frame + (MIN_SAMPLES - HOP) / 2) / SAMPLE_RATE if frame > 0 else 0.0


def word_times(
    spans: Sequence[Span],
    classes: np.ndarray,
    vocabulary: Vocabulary,
    num_frames: int,
    reach_seconds: float = REACH_SECONDS,
) -> list[Word]:
    """When each word that `classes` (symbols,) spell was said, in seconds; with phones each phone is a word.

    `spans` are those of `forced_alignment`, or the frames where a path emits the classes; what a word reaches
    into is said above.
    """
    words = vocabulary.words(classes)
    if not words:
        return []
    times = stretch(
        [(spans[first].start, spans[last - 1].end) for _, first, last in words], num_frames, reach_seconds
    )
    return [Word(*time, word) for time, (word, _, _) in zip(times, words, strict=True)]


def write_alignments(path: Path, times: Iterable[tuple[str, Sequence[Word]]], vocabulary: Vocabulary) -> None:
    """JSON lines that `index` reads as `alignments`: the `words` of each utterance by id, or its `phones`
    where those are spelled."""
    key = "phones" if vocabulary.spelling == "phones" else "words"
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name, words in times:
            file.write(json.dumps({"id": name, key: words}, ensure_ascii=False) + "\n")
