"""Batches of speech: which utterances go together, where each is cropped, and their waveforms.

Utterances of like length share a batch; no utterance is left out for being shorter than the crop. Everything is a pure function
of (seed, epoch, utterance), whatever the number of ranks.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pretrain.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, load_audio
from pretrain.config import Config
from pretrain.engine import Task
from pretrain.manifest import Manifest


class BatchConfig(Config):
    """How much audio goes together, and what is cropped or left out."""

    batch_seconds: float = Field(87.5, gt=0, description="audio in a global batch, padding included")
    crop_seconds: float = Field(15.6, ge=0.025, description="longer utterances are cropped at random, on multiples of 320 samples")
    min_seconds: float = Field(0.1, ge=0.025, description="shorter utterances are left out (counted)")


class SpeechBatches:
    """Plans and loads batches of `manifest`. `crop = False` keeps whole utterances and leaves out those beyond crop_seconds."""

    def __init__(self, manifest: Manifest, config: BatchConfig, seed: int, *, crop: bool = True):
        self.manifest, self.config, self.seed, self.crop = manifest, config, seed, crop
        # A crop of 320 k + 80 samples has exactly k frames and wastes nothing.
        self.crop_samples = int(config.crop_seconds * SAMPLE_RATE) // HOP * HOP + MIN_SAMPLES - HOP
        fits = manifest.lengths >= max(MIN_SAMPLES, config.min_seconds * SAMPLE_RATE)
        if not crop:
            fits &= manifest.lengths <= config.crop_seconds * SAMPLE_RATE
        self.items = np.flatnonzero(fits)
        self.num_left_out = len(manifest) - len(self.items)
        self.lengths = np.minimum(manifest.lengths, self.crop_samples) if crop else manifest.lengths  # samples after cropping

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Batches of at most batch_seconds with padding, sorted by length up to 10 % noise, in random order."""
        rng = np.random.default_rng([self.seed, 1, epoch + 1])
        order = rng.permutation(self.items)
        order = order[np.argsort(self.lengths[order] * rng.uniform(0.95, 1.05, len(order)), kind="stable")]
        batches = [np.array(batch) for batch in self._fill(order)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def plan_in_order(self) -> list[np.ndarray]:
        """The same batches every time, by length: for validation and decoding."""
        return [np.array(batch) for batch in self._fill(self.items[np.argsort(self.lengths[self.items], kind="stable")])]

    def _fill(self, order: np.ndarray) -> list[list[int]]:
        limit = self.config.batch_seconds * SAMPLE_RATE
        batches: list[list[int]] = []
        longest = 0
        for item in order.tolist():
            longest = max(longest, int(self.lengths[item]))
            if not batches or longest * (len(batches[-1]) + 1) > limit:
                batches.append([])
                longest = int(self.lengths[item])
            batches[-1].append(item)
        return batches

    def rng(self, item: int, epoch: int) -> np.random.Generator:
        """The generator for everything random about one utterance in one epoch; the crop takes its first draw."""
        return np.random.default_rng([self.seed, 2, epoch + 1, item])

    def load(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Waveform (samples,) of one utterance, cropped, and the frame that the crop starts at."""
        waveform = load_audio(self.manifest[item])
        first = 0
        if self.crop and len(waveform) > self.crop_samples:
            first = int(rng.integers((len(waveform) - self.crop_samples) // HOP + 1))
        return waveform[first * HOP : first * HOP + self.lengths[item]], first

    def seconds(self, items: np.ndarray) -> float:
        return float(self.lengths[items].sum()) / SAMPLE_RATE


class SpeechTask(Task):
    """A training task whose items are the utterances of `train_set`, validated on `valid_set` if there is one."""

    train_set: SpeechBatches
    valid_set: SpeechBatches | None

    def plan(self, epoch: int) -> list[np.ndarray]:
        return self.train_set.plan(epoch)

    def plan_validation(self) -> list[np.ndarray]:
        return self.valid_set.plan_in_order() if self.valid_set else []

    def amount(self, items: np.ndarray) -> float:
        return self.train_set.seconds(items)


def pad(arrays: list[np.ndarray], value: float | int | bool) -> Tensor:
    """Stack arrays of different first dimension: (batch, longest, ...), filled with `value`."""
    out = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
