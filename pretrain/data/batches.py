"""Batches of speech: which utterances go together, where each is cropped, and their waveforms.

A batch is filled with utterances in random order, whatever their lengths, and then shared among the
micro-batches so that each has about the same amount of audio: nothing is padded, so like lengths need not go
together (sorted by length, the slowest micro-batch has up to 25 % more to do). No utterance is left out for
being shorter than the crop. Everything is a pure function of (seed, epoch, utterance), whatever the number of
ranks.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretrain.config import Config
from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE


class BatchConfig(Config):
    """How much audio goes together, and what is cropped or left out."""

    batch_seconds: float = Field(87.5, gt=0, description="audio in a global batch, at most")
    crop_seconds: float = Field(
        15.6, ge=0.025, description="longer utterances are cropped at random, on multiples of 320 samples"
    )
    min_seconds: float = Field(0.1, ge=0.025, description="shorter utterances are left out (counted)")

    @model_validator(mode="before")
    @classmethod
    def _without_decoder(cls, keys: Any) -> Any:
        """Ignores `decoder`, a key of earlier versions that changed no sample."""
        if not isinstance(keys, dict):
            return keys
        return {key: value for key, value in keys.items() if key != "decoder"}


_ROWS = 1 << 20  # planned at a time: nothing but the plan itself grows with the number of utterances


class SpeechBatches:
    """Plans and loads batches of `manifest`.

    `crop = False` keeps whole utterances and leaves out those beyond crop_seconds.
    """

    def __init__(self, manifest: Manifest, config: BatchConfig, seed: int, *, crop: bool = True):
        self.manifest, self.config, self.seed, self.crop = manifest, config, seed, crop
        # A crop of 320 k + 80 samples has exactly k frames and wastes nothing.
        self.crop_samples = int(config.crop_seconds * SAMPLE_RATE) // HOP * HOP + MIN_SAMPLES - HOP
        lengths = manifest.lengths
        fits = lengths >= max(MIN_SAMPLES, config.min_seconds * SAMPLE_RATE)
        if not crop:
            fits &= lengths <= config.crop_seconds * SAMPLE_RATE
        self.items = _compact(np.flatnonzero(fits))
        self.num_left_out = len(manifest) - len(self.items)
        # Samples after cropping.
        self.lengths = _compact(np.minimum(lengths, self.crop_samples) if crop else lengths)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Batches of at most batch_seconds of audio, filled in random order.

        A longer utterance is a batch alone.
        """
        return self._fill(np.random.default_rng([self.seed, 1, epoch + 1]).permutation(self.items))

    def plan_in_order(self) -> list[np.ndarray]:
        """The same batches every time, by length: for validation and decoding."""
        return self._fill(self.items[np.argsort(self.lengths[self.items], kind="stable")])

    def _fill(self, order: np.ndarray) -> list[np.ndarray]:
        limit = int(self.config.batch_seconds * SAMPLE_RATE)
        batches, first, rows = [], 0, _ROWS
        while first < len(order):
            some = order[first : first + rows]
            lengths = self.lengths[some]
            ends = np.cumsum(lengths, dtype=np.int64)
            # The end of the batch that begins with each utterance: only one step a batch is left for Python.
            following = np.searchsorted(ends, ends - lengths + limit, side="right")
            following = np.maximum(following, np.arange(1, len(some) + 1))
            begin = 0
            while begin < len(some):
                end = following.item(begin)
                if end == len(some) and first + end < len(order):
                    break  # it may continue in the rows that follow, which begin with it
                batches.append(some[begin:end])
                begin = end
            first, rows = first + begin, _ROWS if begin else 2 * rows
        return batches

    def rng(self, item: int, epoch: int) -> np.random.Generator:
        """The generator of everything random about an utterance in an epoch; the first draw is the crop."""
        return np.random.default_rng([self.seed, 2, epoch + 1, item])

    def load(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Waveform (samples,) of one utterance, cropped, and the frame that the crop starts at."""
        utterance = self.manifest[item]
        if not self.crop or utterance.length <= self.crop_samples:
            return load_audio(utterance), 0
        first = int(rng.integers((utterance.length - self.crop_samples) // HOP + 1))
        return load_audio(utterance, first * HOP, self.crop_samples), first

    def seconds(self, items: np.ndarray) -> float:
        return float(self.lengths[items].sum()) / SAMPLE_RATE

    def pack(self, loaded: list[np.ndarray]) -> tuple[Tensor, Layout]:
        """Several loaded utterances as one buffer."""
        return pack(loaded)


def require_audio(config: Any) -> None:
    """Raises ValueError if no utterance of the config's `split` is long enough; reads the manifest alone."""
    manifest = Manifest(config.manifest)
    rows, limits = manifest.select(config.split), config.batches
    if not len(SpeechBatches(rows, limits, 0).items):
        raise ValueError(
            f"{manifest.folder}: all {len(rows)} utterances of split {config.split!r} are shorter than "
            f"batches.min_seconds = {limits.min_seconds:g}, so there is nothing to learn from"
        )


def _compact(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in 32 bits where they fit: a rank holds several for every utterance."""
    return numbers.astype(np.int32) if not len(numbers) or numbers.max() < 2**31 else numbers


def pad(arrays: list[np.ndarray], value: float | int | bool) -> Tensor:
    """Stack arrays of different first dimension: (batch, longest, ...), filled with `value`."""
    return pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True, padding_value=value)
