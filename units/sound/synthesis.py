"""Training of the synthesizer, which speaks units: its batches, its task for the engine, the verb
`train-synthesizer`.

Units with their durations come from a unit corpus, sound from the manifest it was packed from. Where the
manifest names speakers each has an embedding, so that units need not explain the voice. Equal units in a row
are one unit as long as all of them, so a corpus that was not deduplicated teaches the same. The levels of a
residual codebook are embedded one by one and summed.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from pretrain.config import Config, PathStr, Split
from pretrain.data.audio import load_audio
from pretrain.data.batches import BatchConfig, SpeechBatches, pad
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import num_frames
from pretrain.training.checkpoint import load_weights
from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.speech_task import SpeechTask
from pretrain.training.task import OptimizerConfig, TrainingConfig
from units.corpus.unit_corpus import UnitCorpus
from units.sound.griffin_lim import log_mel
from units.sound.pitch import pitch
from units.sound.unit_to_mel import Batch, SynthesizerModelConfig, UnitToMel, mel_style

KIND = "synthesizer"
_STATISTICS_UTTERANCES = 200


class SynthesizerBatchConfig(BatchConfig):
    """Short crops: nothing here reaches far."""

    batch_seconds: float = Field(10.0, gt=0, description="audio in a global batch, at most")
    crop_seconds: float = Field(
        3.0, ge=0.025, description="longer utterances are cropped at random, on multiples of 320 samples"
    )


class SynthesizerOptimizerConfig(OptimizerConfig):
    """AdamW for a run of minutes."""

    lr: float = Field(4e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, ge=0)
    schedule: Literal["constant", "linear", "polynomial", "cosine", "tri_stage"] = "cosine"
    warmup_steps: int = Field(20, ge=0)


class SynthesizerConfig(Config):
    """Train a synthesizer on the units of one split of a corpus and the sound they came from."""

    manifest: PathStr
    corpus: PathStr = Field(description="a unit corpus of this manifest's utterances, with durations")
    out: PathStr
    split: Split = "train"
    valid_split: Split = Field(
        "dev", description='its loss is reported while training, if the corpus has it; "": no validation'
    )
    model: SynthesizerModelConfig = SynthesizerModelConfig()
    batches: SynthesizerBatchConfig = SynthesizerBatchConfig()
    training: TrainingConfig
    optimizer: SynthesizerOptimizerConfig = SynthesizerOptimizerConfig()


class SynthesizerTask(SpeechTask):
    """Mel spectrograms of crops from their units."""

    model: UnitToMel

    def __init__(self, config: SynthesizerConfig, manifest: Manifest, corpus: UnitCorpus):
        require_speakable(corpus)
        seed = config.training.seed
        torch.manual_seed(seed)
        chosen = manifest.select(config.split)
        named = set(chosen.column("speaker").to_pylist()) - {None} if config.model.speakers else set()
        self.speakers = sorted(named)
        self.corpus = corpus
        self.model = UnitToMel(config.model, corpus.num_units, corpus.num_levels, len(self.speakers))
        self.train_set = SpeechBatches(chosen, config.batches, seed)
        self.valid_set = None
        if config.valid_split in manifest.splits and config.valid_split != config.split:
            self.valid_set = SpeechBatches(manifest.select(config.valid_split), config.batches, seed)
        numbers = {name: number for number, name in enumerate(corpus.ids)}
        self.documents = _documents_of(chosen, corpus, numbers)
        self.valid_documents = (
            _documents_of(self.valid_set.manifest, corpus, numbers) if self.valid_set else self.documents[:0]
        )
        set_statistics(self.model, chosen, self.speakers)

    def blocks(self) -> list[nn.Module]:
        return [
            *self.model.unit_layers,
            self.model.duration_layer,
            *self.model.pitch_layers,
            *self.model.frame_layers,
        ]

    def collate(self, items: np.ndarray, epoch: int) -> Batch:
        return self._load(self.train_set, self.documents[items], items, epoch)

    def collate_validation(self, items: np.ndarray) -> Batch:
        assert self.valid_set is not None
        return self._load(self.valid_set, self.valid_documents[items], items, -1)

    def _load(self, part: SpeechBatches, documents: np.ndarray, items: np.ndarray, epoch: int) -> Batch:
        mels, pitches, crops, speakers = [], [], [], []
        for item, document in zip(items.tolist(), documents.tolist(), strict=True):
            waveform, first = part.load(item, part.rng(item, epoch))
            runs = merge_runs(self.corpus.units(document), self.corpus.durations(document))
            crops.append(crop_runs(*runs, first, num_frames(len(waveform))))
            mels.append(log_mel(waveform).numpy())
            pitches.append(pitch(waveform).numpy())
            speakers.append(speaker_number(self.speakers, part.manifest[item].speaker))
        units, durations, whole = (list(column) for column in zip(*crops, strict=True))
        return Batch(
            pad(units, 0),
            pad(durations, 0),
            pad(whole, False),
            torch.tensor(speakers),
            pad(mels, 0.0),
            pad(pitches, 0.0),
        )


def train_synthesizer(config: SynthesizerConfig) -> dict[str, Any]:
    """Run the verb; returns the training summary. `mel_decibels` is the mean distance of mel magnitudes, of
    given durations."""
    manifest, corpus = Manifest(config.manifest), UnitCorpus(config.corpus)
    task = SynthesizerTask(config, manifest, corpus)
    described = {
        "codebook": corpus.codebook,
        "num_units": corpus.num_units,
        "num_levels": corpus.num_levels,
        "deduplicated": corpus.deduplicated,
        "frame_rate_hz": corpus.frame_rate_hz,
        "speakers": task.speakers,
        "num_parameters": sum(parameter.numel() for parameter in task.model.parameters()),
    }
    summary = train(
        Run(
            task,
            out=config.out,
            kind=KIND,
            training=config.training,
            optimizer=config.optimizer,
            config=config.resolved(),
            parents={"manifest": manifest.fingerprint, "corpus": corpus.fingerprint},
            extra=described,
        )
    )
    left_out = {"utterances": len(task.train_set.items), "utterances_left_out": task.train_set.num_left_out}
    return {
        **summary,
        **left_out,
        "num_speakers": len(task.speakers),
        "num_parameters": described["num_parameters"],
    }


def require_speakable(corpus: UnitCorpus) -> None:
    """The corpus has plain units at 50 Hz with their durations, or ValueError."""
    if corpus.vocabulary.layout != "units":
        raise ValueError(
            f"{corpus.folder}: has text among its units (layout {corpus.vocabulary.layout!r}); pack the same "
            "labels without text, and take that corpus here"
        )
    if not corpus.timed:
        raise ValueError(
            f"{corpus.folder}: its units have no durations, and sound needs to know when each is heard; pack "
            "labels, or import units with their durations"
        )
    if corpus.frame_rate_hz != 50:
        raise ValueError(
            f"{corpus.folder}: has {corpus.frame_rate_hz:g} frames a second; mel frames lie on a grid of 50"
        )


def merge_runs(units: np.ndarray, durations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal units in a row as one: (runs, levels) int64 and the frames of each (runs,) int64, of units
    (units,) or (units, levels)."""
    units = units.reshape(len(units), -1).astype(np.int64)
    starts = np.flatnonzero(np.concatenate([[True], (units[1:] != units[:-1]).any(axis=1)]))
    return units[starts], np.add.reduceat(durations.astype(np.int64), starts)


def crop_runs(
    units: np.ndarray, durations: np.ndarray, first: int, frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The units heard in `frames` frames from `first`, how long each is, and whether that is all of it."""
    ends = durations.cumsum()
    starts = ends - durations
    here = slice(
        int(np.searchsorted(ends, first, side="right")),
        int(np.searchsorted(starts, first + frames, side="left")),
    )
    heard = np.minimum(ends[here], first + frames) - np.maximum(starts[here], first)
    return units[here], heard, heard == durations[here]


def speaker_number(speakers: list[str], speaker: str | None) -> int:
    """Place of a speaker among those of the training; their number, the mean voice, for any other."""
    return speakers.index(speaker) if speaker in speakers else len(speakers)


def set_statistics(model: UnitToMel, manifest: Manifest, speakers: list[str]) -> None:
    """The mel bands' mean and deviation, and the style of each speaker, from up to 200 utterances spread
    evenly over the manifest."""
    rows = np.unique(np.linspace(0, len(manifest) - 1, _STATISTICS_UTTERANCES).round().astype(int)).tolist()
    utterances = [manifest[row] for row in rows]
    mels = [log_mel(load_audio(utterance)) for utterance in utterances]
    every = torch.cat(mels)
    model.mel_mean = every.mean(0)
    # a band that never changes is not blown up
    model.mel_deviation = every.std(0, correction=0).clamp(min=0.1)
    owners = torch.tensor([speaker_number(speakers, utterance.speaker) for utterance in utterances])
    normalised = [((mel - model.mel_mean) / model.mel_deviation)[None] for mel in mels]
    styles = torch.cat([mel_style(mel, torch.ones(1, mel.shape[1], dtype=torch.bool)) for mel in normalised])
    # also of those that none of these utterances is of
    model.styles = styles.mean(0).repeat(len(speakers) + 1, 1)
    for owner in set(owners.tolist()) - {len(speakers)}:
        model.styles[owner] = styles[owners == owner].mean(0)


def _documents_of(manifest: Manifest, corpus: UnitCorpus, numbers: dict[str, int]) -> np.ndarray:
    """Which document of the corpus each utterance is, (utterances,); one that is missing or of another length
    is a ValueError."""
    ids = manifest.ids
    missing = [name for name in ids if name not in numbers]
    if missing:
        raise ValueError(
            f"{corpus.folder}: no units for {len(missing)} of {len(ids)} utterances of {manifest.folder}, "
            f"first {missing[0]!r}; give the manifest that was encoded and packed"
        )
    documents = np.array([numbers[name] for name in ids])
    require_same_frames(corpus, documents, manifest)
    return documents


def require_same_frames(corpus: UnitCorpus, documents: np.ndarray, manifest: Manifest) -> None:
    """Documents (utterances,) of the corpus last as long as the manifest's utterances, one by one, or
    ValueError."""
    wrong = np.flatnonzero(corpus.num_frames[documents] != manifest.num_frames)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{corpus.folder}: {corpus.num_frames[documents[row]]} frames for utterance "
            f"{manifest.ids[row]!r}, which has {manifest.num_frames[row]} in {manifest.folder}; give the "
            "manifest that was encoded and packed"
        )


def load_unit_to_mel(run: str | Path) -> tuple[UnitToMel, dict[str, Any], str]:
    """Model in eval mode, the run's meta data and its weights' fingerprint. ValueError where the run is no
    synthesizer."""
    weights, meta, fingerprint = load_weights(run)
    if meta["kind"] != KIND:
        raise ValueError(
            f"{run}: is a run of kind {meta['kind']!r}; a {KIND!r} (verb train-synthesizer) is needed here"
        )
    config = SynthesizerModelConfig.model_validate(meta["config"]["model"])
    model = UnitToMel(config, meta["num_units"], meta["num_levels"], len(meta["speakers"]))
    model.load_state_dict(weights)
    return model.eval(), meta, fingerprint
