"""Batches of speech: which utterances go together, where each is cropped, and their waveforms.

A batch is filled with utterances in random order, whatever their lengths, and then shared among the micro-batches so that each
has about the same amount of audio: nothing is padded, so like lengths need not go together (sorted by length, the slowest
micro-batch has up to 25 % more to do). No utterance is left out for being shorter than the crop. Everything is a pure function of
(seed, epoch, utterance), whatever the number of ranks.
"""

import heapq
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Config
from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE
from pretrain.training.task import Task


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
        return (
            {key: value for key, value in keys.items() if key != "decoder"}
            if isinstance(keys, dict)
            else keys
        )


_ROWS = 1 << 20  # planned at a time: nothing but the plan itself should grow with the number of utterances


class SpeechBatches:
    """Plans and loads batches of `manifest`. `crop = False` keeps whole utterances and leaves out those beyond crop_seconds."""

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
        self.lengths = _compact(
            np.minimum(lengths, self.crop_samples) if crop else lengths
        )  # samples after cropping

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Batches of at most batch_seconds of audio, filled in random order; an utterance that is longer is a batch alone."""
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
            # Where the batch that begins with each utterance would end: then only one step a batch is left for Python.
            following = np.maximum(
                np.searchsorted(ends, ends - lengths + limit, side="right"), np.arange(1, len(some) + 1)
            )
            begin = 0
            while begin < len(some):
                end = following.item(begin)
                if end == len(some) and first + end < len(order):
                    break  # it may go on in the rows that follow, which begin with it
                batches.append(some[begin:end])
                begin = end
            first, rows = first + begin, _ROWS if begin else 2 * rows
        return batches

    def rng(self, item: int, epoch: int) -> np.random.Generator:
        """The generator for everything random about one utterance in one epoch; the crop takes its first draw."""
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
        """What `load` gave for several utterances, as one buffer."""
        return pack(loaded)


def require_audio(config: Any) -> None:
    """ValueError where the `manifest` of a config has no utterance in `split` that `batches` takes; reads the manifest alone."""
    manifest = Manifest(config.manifest)
    rows, limits = manifest.select(config.split), config.batches
    if not len(SpeechBatches(rows, limits, 0).items):
        raise ValueError(
            f"{manifest.folder}: all {len(rows)} utterances of split {config.split!r} are shorter than batches.min_seconds = "
            f"{limits.min_seconds:g}, so there is nothing to learn from"
        )


class SpeechTask(Task):
    """A training task whose items are the utterances of `train_set`, validated on `valid_set` if there is one."""

    train_set: SpeechBatches
    valid_set: SpeechBatches | None

    def plan(self, epoch: int) -> list[np.ndarray]:
        return self.train_set.plan(epoch)

    def split(self, items: np.ndarray, parts: int) -> list[np.ndarray]:
        """Micro-batches of like total length: the longest first, each to the part that has least. Each part keeps the batch's order."""
        lengths = self.train_set.lengths[items]
        place = np.empty(len(items), np.int64)
        totals = [(0, part) for part in range(parts)]
        for longest in np.argsort(-lengths, kind="stable").tolist():
            total, part = totals[0]
            place[longest] = part
            heapq.heapreplace(totals, (total + int(lengths[longest]), part))
        return [items[place == part] for part in range(parts)]

    def plan_validation(self) -> list[np.ndarray]:
        return self.valid_set.plan_in_order() if self.valid_set else []

    def amount(self, items: np.ndarray) -> float:
        return self.train_set.seconds(items)


def _compact(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in 32 bits where they fit: a rank holds several for every utterance."""
    return numbers.astype(np.int32) if not len(numbers) or numbers.max() < 2**31 else numbers


def pad(arrays: list[np.ndarray], value: float | int | bool) -> Tensor:
    """Stack arrays of different first dimension: (batch, longest, ...), filled with `value`."""
    out = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
