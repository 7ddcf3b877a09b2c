"""The verb `finetune`: CTC on transcripts, from a pretrained encoder or, for comparison, from random weights."""

import unicodedata
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pretrain.audio import SAMPLE_RATE
from pretrain.batches import BatchConfig, SpeechBatches
from pretrain.config import Config
from pretrain.ctc import SPACE, CTCConfig, CTCTask, Recognizer, TextConfig, Vocabulary
from pretrain.encoder import load_encoder
from pretrain.engine import OptimizerConfig, TrainingConfig, train
from pretrain.manifest import Manifest


class CTCOptimizerConfig(OptimizerConfig):
    """The engine's AdamW with wav2vec 2.0's fine-tuning schedule as its default."""

    schedule: Literal["constant", "linear", "polynomial", "cosine", "tri_stage"] = "tri_stage"
    weight_decay: float = Field(0.0, ge=0)


class FinetuneConfig(Config):
    """Which transcripts, which encoder, and how it is fine-tuned."""

    out: str
    manifest: str
    split: str | None = "train"
    valid_split: str | None = "dev"
    label_minutes: float | None = Field(None, gt=0, description="a seeded draw of this much labelled audio; all when not given")
    encoder: str = Field(description="a pretraining run")
    initialization: Literal["pretrained", "random"] = Field("pretrained", description="random: its architecture, fresh weights")
    characters: str | None = Field(
        None, description="the vocabulary; taken from the transcripts of split and valid_split when not given"
    )
    text: TextConfig = TextConfig()
    ctc: CTCConfig = CTCConfig()
    batches: BatchConfig = BatchConfig()
    optimizer: CTCOptimizerConfig = CTCOptimizerConfig()
    training: TrainingConfig


def transcribed(manifest: Manifest) -> np.ndarray:
    """Numbers of the rows that have a transcript."""
    return np.flatnonzero([bool(utterance.text) for utterance in manifest])


def draw_labelled(manifest: Manifest, minutes: float | None, seed: int) -> np.ndarray:
    """Row numbers of about `minutes` of transcribed audio, speakers taking turns; a smaller budget lies inside a larger one."""
    usable = transcribed(manifest)
    if not len(usable):
        raise ValueError(f"{manifest.folder}: no utterance has a transcript; `finetune` needs some")
    if minutes is None:
        return usable
    queues: dict[str | None, list[int]] = {}
    for row in np.random.default_rng([seed, 3]).permutation(usable).tolist():
        queues.setdefault(manifest[row].speaker, []).append(row)
    turns = sorted((turn, index, row) for index, queue in enumerate(queues.values()) for turn, row in enumerate(queue))
    rows = np.array([row for _, _, row in turns])
    total = np.cumsum(manifest.lengths[rows]) / (60 * SAMPLE_RATE)
    if total[-1] < minutes:
        raise ValueError(f"{manifest.folder}: label_minutes = {minutes} but only {total[-1]:.1f} minutes are transcribed")
    return rows[: int(np.searchsorted(total, minutes)) + 1]


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run the verb; returns the training summary with the labelled minutes used and the vocabulary's size."""
    manifest = Manifest(config.manifest)
    seed = config.training.seed
    chosen = manifest.select(config.split)
    labelled = chosen.take(draw_labelled(chosen, config.label_minutes, seed))
    valid = manifest.select(config.valid_split) if config.valid_split in manifest.splits else None
    valid = valid.take(transcribed(valid)) if valid else None
    if config.characters:
        characters = unicodedata.normalize("NFC", config.characters).replace(" ", SPACE)
        vocabulary = Vocabulary(list(dict.fromkeys(characters)))
    else:  # the alphabet of the whole corpus: a letter that the drawn minutes happen to miss is still a letter
        known = [chosen, *([valid] if valid else [])]
        vocabulary = Vocabulary.of(
            [config.text.normalize(utterance.text) for rows in known for utterance in rows if utterance.text]
        )
    encoder, encoder_fingerprint = load_encoder(config.encoder)
    torch.manual_seed(seed)
    model = Recognizer(encoder.config, len(vocabulary), config.ctc.final_dropout)
    pretrained = config.initialization == "pretrained"
    if pretrained:
        model.encoder.load_state_dict(encoder.state_dict())
    train_set = SpeechBatches(labelled, config.batches, seed, crop=False)
    valid_set = SpeechBatches(valid, config.batches, seed, crop=False) if valid else None
    task = CTCTask(model, config.ctc, vocabulary, config.text, train_set, valid_set, frozen_phases=pretrained, seed=seed)
    summary = train(
        task, out=config.out, kind="recognizer", training=config.training, optimizer=config.optimizer, config=config.resolved(),
        parents={"manifest": manifest.fingerprint, "encoder": encoder_fingerprint},
        extra={"vocabulary": vocabulary.symbols, "config_encoder": encoder.config.resolved()},
    )  # fmt: skip
    minutes = float(labelled.lengths[train_set.items].sum() / SAMPLE_RATE / 60)
    used = {"label_minutes": minutes, "utterances": len(train_set.items), "utterances_left_out": train_set.num_left_out}
    return {**summary, **used, "vocabulary": len(vocabulary)}
