"""The verb `pretrain`: HuBERT or wav2vec 2.0 on a manifest."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.batches import BatchConfig, SpeechBatches, SpeechTask, pad
from pretrain.config import Config
from pretrain.encoder import EncoderConfig
from pretrain.engine import OptimizerConfig, TrainingConfig, train
from pretrain.frontend import num_frames
from pretrain.hubert import IGNORED, Hubert, HubertBatch, HubertConfig, perplexity
from pretrain.labels import Labels
from pretrain.manifest import Manifest
from pretrain.masking import span_mask
from pretrain.wav2vec2 import Wav2Vec2, Wav2Vec2Batch, Wav2Vec2Config, draw_distractors


class AlarmConfig(Config):
    """When a run counts as collapsed: after `after_steps`, the perplexity of the predicted classes or codes below `perplexity`."""

    after_steps: int = Field(200, ge=0)
    perplexity: float = Field(2.0, ge=0)


class PretrainConfig(Config):
    """Data, objective, architecture and training of an encoder."""

    out: str
    manifest: str
    split: str | None = "train"
    valid_split: str | None = "dev"
    objective: Literal["hubert", "wav2vec2"]
    labels: str | None = Field(None, description="HuBERT's targets: a labels folder")
    encoder: EncoderConfig = EncoderConfig()
    hubert: HubertConfig = HubertConfig()
    wav2vec2: Wav2Vec2Config = Wav2Vec2Config()
    batches: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    alarm: AlarmConfig = AlarmConfig()

    @model_validator(mode="after")
    def _labels_belong_to_hubert(self) -> "PretrainConfig":
        if (self.objective == "hubert") != (self.labels is not None):
            raise ValueError('`labels` is needed for objective = "hubert" and only there')
        return self


class PretrainTask(SpeechTask):
    """What both objectives share; `_draw` of a subclass adds its own targets."""

    model: Hubert | Wav2Vec2

    def __init__(self, config: PretrainConfig, manifest: Manifest):
        self.config = config
        seed = config.training.seed
        self.train_set = SpeechBatches(manifest.select(config.split), config.batches, seed)
        use_valid = config.valid_split is not None and config.valid_split in manifest.splits
        self.valid_set = SpeechBatches(manifest.select(config.valid_split), config.batches, seed) if use_valid else None

    def collate(self, items: np.ndarray, epoch: int) -> Any:
        return self._collate(self.train_set, items, epoch)

    def collate_validation(self, items: np.ndarray) -> Any:
        assert self.valid_set is not None
        return self._collate(self.valid_set, items, -1)

    def _collate(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> Any:
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        self.model.encoder.draw_layers(self.config.training.seed, step)

    def alarm(self, metrics: dict[str, float], step: int) -> str | None:
        name = "prediction_perplexity" if isinstance(self.model, Hubert) else "code_perplexity"
        if step < self.config.alarm.after_steps or metrics[name] >= self.config.alarm.perplexity:
            return None
        return (
            f"collapsed: {name} is {metrics[name]:.2f}, below alarm.perplexity = {self.config.alarm.perplexity}. Try a lower "
            "optimizer.lr, a longer optimizer.warmup_steps, or (wav2vec 2.0) a higher wav2vec2.diversity_weight."
        )


class HubertTask(PretrainTask):
    """HuBERT: the targets are labels from a file."""

    def __init__(self, config: PretrainConfig, manifest: Manifest, labels: Labels):
        super().__init__(config, manifest)
        if labels.num_levels != 1:
            raise ValueError(f"{labels.folder}: has {labels.num_levels} levels; HuBERT learns from one")
        self.labels = labels
        for batches in (self.train_set, self.valid_set):
            if batches is not None:
                check_label_counts(batches, labels)
        self.model = Hubert(config.encoder, config.hubert, labels.num_classes)

    def _collate(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> HubertBatch:
        waveforms, masks, labels = [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveform, first = batches.load(item, rng)
            frames = num_frames(len(waveform))
            target = np.full(frames, IGNORED, np.int64)
            known = self.labels[batches.manifest[item].id][first : first + frames].astype(np.int64)
            target[: len(known)] = known
            waveforms.append(waveform)
            masks.append(span_mask(frames, self.config.hubert.mask_start_probability, self.config.hubert.mask_length, rng))
            labels.append(target)
        return HubertBatch(pad(waveforms, 0), _lengths(waveforms), pad(masks, False), pad(labels, IGNORED))

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        return {**super().describe(metrics), "prediction_perplexity": perplexity(metrics["_predicted"].numpy())}


class Wav2Vec2Task(PretrainTask):
    """wav2vec 2.0: the targets are the utterance's own quantised features."""

    def __init__(self, config: PretrainConfig, manifest: Manifest):
        super().__init__(config, manifest)
        self.model = Wav2Vec2(config.encoder, config.wav2vec2)

    def _collate(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> Wav2Vec2Batch:
        waveforms, masks, masked_frames, distractors = [], [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveform, _ = batches.load(item, rng)
            frames = num_frames(len(waveform))
            mask = span_mask(frames, self.config.wav2vec2.mask_start_probability, self.config.wav2vec2.mask_length, rng)
            waveforms.append(waveform)
            masks.append(mask)
            masked_frames.append(np.flatnonzero(mask))
            distractors.append(draw_distractors(len(masked_frames[-1]), self.config.wav2vec2.num_distractors, rng))
        count = _lengths(masked_frames)
        return Wav2Vec2Batch(
            pad(waveforms, 0), _lengths(waveforms), pad(masks, False), pad(masked_frames, 0), count, pad(distractors, 0)
        )  # fmt: skip

    def before_step(self, step: int) -> None:
        super().before_step(step)
        assert isinstance(self.model, Wav2Vec2)
        self.model.set_step(step)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        perplexities = [perplexity(group) for group in metrics["_codes"].numpy()]
        return {**super().describe(metrics), "code_perplexity": float(np.mean(perplexities))}


def check_label_counts(batches: SpeechBatches, labels: Labels) -> None:
    """Every utterance has labels and their number differs from its frames by at most one, or ValueError names it."""
    for item in batches.items.tolist():
        utterance = batches.manifest[item]
        have, want = labels.num_frames(utterance.id), utterance.num_frames
        if abs(have - want) > 1:
            raise ValueError(f"{labels.folder}: {have} labels for utterance {utterance.id!r}, which has {want} frames of 20 ms")


def _lengths(arrays: list[np.ndarray]) -> Tensor:
    return torch.tensor([len(array) for array in arrays])


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the verb; returns the training summary with the number of parameters and of utterances used."""
    manifest = Manifest(config.manifest)
    parents = {"manifest": manifest.fingerprint}
    extra: dict[str, str] = {"objective": config.objective}
    torch.manual_seed(config.training.seed)  # the initial weights
    task: PretrainTask
    if config.labels is not None:
        labels = Labels(config.labels)
        parents["labels"], extra["codebook"] = labels.fingerprint, labels.codebook
        task = HubertTask(config, manifest, labels)
    else:
        task = Wav2Vec2Task(config, manifest)
    summary = train(
        task, out=config.out, kind="encoder", training=config.training, optimizer=config.optimizer,
        config=config.resolved(), parents=parents, extra=extra,
    )  # fmt: skip
    return {**summary, "parameters": num_parameters(task.model), "utterances_left_out": task.train_set.num_left_out}


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())
