"""Frames to fit on: drawn while features stream by, so that memory holds the sample and never the corpus.

Which frames are drawn is a function of the seed and the manifest alone.
"""

import numpy as np

from pretrain.audio import SAMPLE_RATE
from pretrain.manifest import Manifest, Utterance
from pretrain.progress import progress
from quantize.features import FeatureSource

VISIT = 4  # audio that may be decoded and encoded, relative to the frames wanted


def plan_sample(num_frames: np.ndarray, budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which utterances to visit and how many frames to draw from each: (rows ascending, counts), `budget` frames or all there are.

    Utterances are drawn until they hold `VISIT` times the budget; each then gives the same share of its frames.
    """
    order = np.random.default_rng([seed, len(num_frames)]).permutation(len(num_frames))
    ends = np.cumsum(num_frames[order])
    rows = np.sort(order[: int(np.searchsorted(ends, VISIT * budget)) + 1])
    ends = np.cumsum(num_frames[rows], dtype=np.int64)
    quotas = ends * min(budget, ends[-1]) // ends[-1]  # Python-exact integers: no utterance gives more than it has
    counts = np.diff(quotas, prepend=0)
    return rows[counts > 0], counts[counts > 0]


class Sample:
    """Frames drawn from each utterance it visits, in manifest order whatever the order of arrival."""

    def __init__(self, rows: Manifest, budget: int, seed: int):
        lengths = rows.lengths
        visited, counts = plan_sample(rows.num_frames, budget, seed)
        self.utterances = [rows[int(row)] for row in visited]
        self.size = int(counts.sum())
        self.seconds = float(lengths[visited].sum() / SAMPLE_RATE)
        starts = np.cumsum(counts) - counts
        self._places = {
            utterance.id: (int(row), int(start), int(count))
            for utterance, row, start, count in zip(self.utterances, visited, starts, counts, strict=True)
        }
        self._seed = seed

    def draw(self, utterance: Utterance) -> tuple[slice, np.ndarray]:
        """Where this utterance's frames go in the sample, and which of its frames they are."""
        row, start, count = self._places[utterance.id]
        chosen = np.random.default_rng([self._seed, row, 1]).choice(utterance.num_frames, size=count, replace=False)
        return slice(start, start + count), np.sort(chosen)


def sample_frames(source: FeatureSource, rows: Manifest, budget: int, seed: int) -> np.ndarray:
    """Up to `budget` frames of `rows`, (frames, dim) float32."""
    sample = Sample(rows, budget, seed)
    frames = np.empty((sample.size, source.dim), dtype=np.float32)
    with progress("frames to fit on", total=sample.seconds, unit="s") as advance:
        for utterance, features in source.features(sample.utterances):
            place, chosen = sample.draw(utterance)
            frames[place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
    return frames
