"""Discrete units in place of waveforms: the labels of a manifest's utterances, for recognisers that read
units.

They compare what units keep of speech with what features do: the same transcripts, the same loss, a small
encoder over one embedding for each class of the codebook. The codebook is the recogniser's; labels of another
are refused.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import Config, parse_config
from pretrain.ctc.model import LoadedRecognizer
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP, MIN_SAMPLES


class UnitConfig(Config):
    """What a recogniser reads of labels."""

    levels: int = Field(
        1, ge=1, description="of residual labels the first so many; their embeddings are added"
    )
    deduplicate: bool = Field(
        False, description="runs of a unit read once: shorter, without the durations, and without word times"
    )

    def num_embeddings(self, labels: Labels) -> int:
        """Classes of all levels read; ValueError where `labels` have not that many levels."""
        if self.levels > labels.num_levels:
            raise ValueError(f"units.levels = {self.levels}, but {labels.folder} has {labels.num_levels}")
        return self.levels * labels.num_classes

    def read(self, labels: Labels, utterance: str) -> np.ndarray:
        """Units (frames,) int64, or (frames, levels), where each level counts on from the classes of those
        before it."""
        units = labels[utterance].astype(np.int64).reshape(-1, labels.num_levels)[:, : self.levels]
        if self.deduplicate and len(units):
            units = units[np.r_[True, (units[1:] != units[:-1]).any(1)]]
        units += labels.num_classes * np.arange(self.levels)
        return units[:, 0] if self.levels == 1 else units

    def counts(self, labels: Labels, manifest: Manifest) -> np.ndarray:
        """Units of each utterance of `manifest`, (utterances,) int64.

        ValueError for one that has no labels, or not as many as frames (give or take one).
        """
        ids = manifest.column("id")
        labels.require_frames(ids, manifest.num_frames)
        if not self.deduplicate:
            return labels.frame_counts(ids)
        return np.array([len(self.read(labels, name)) for name in ids.to_pylist()], np.int64)


class LabelBatches(SpeechBatches):
    """Whole utterances of `manifest`, planned by their audio and read from `labels`; what has none is an
    error that names it."""

    def __init__(
        self,
        manifest: Manifest,
        labels: Labels,
        config: BatchConfig,
        seed: int,
        units: UnitConfig | None = None,
    ):
        super().__init__(manifest, config, seed, crop=False)
        self.labels, self.units = labels, units or UnitConfig()
        self.units.num_embeddings(labels)
        rows = manifest.take(self.items)
        labels.require_frames(rows.column("id"), rows.num_frames)
        self.items = self.items[labels.frame_counts(rows.column("id")) > 0]
        self.num_left_out = len(manifest) - len(self.items)

    def load(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Units (frames,) or (frames, levels) int64 of one utterance."""
        return self.units.read(self.labels, self.manifest[item].id), 0

    def pack(self, loaded: list[np.ndarray]) -> tuple[Tensor, Layout]:
        # The samples that have as many frames as there are units.
        layout = Layout(tuple(MIN_SAMPLES + HOP * (len(units) - 1) for units in loaded))
        return torch.from_numpy(np.concatenate(loaded)), layout


def unit_batches(
    recognizer: LoadedRecognizer, labels: str, manifest: Manifest, config: BatchConfig
) -> LabelBatches:
    """Batches of `manifest` for a recogniser of units, read as it learned to; ValueError where `labels` are
    of another codebook."""
    found = Labels(labels)
    if found.codebook != recognizer.codebook:
        raise ValueError(
            f"labels: {labels} are of codebook {found.codebook}, and the recogniser learned units of "
            f"codebook {recognizer.codebook}; encode the audio with that one"
        )
    units = parse_config(UnitConfig, recognizer.meta["config"].get("units", {}), "the recogniser's units")
    return LabelBatches(manifest, found, config, 0, units)
