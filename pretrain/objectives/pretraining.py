"""The verb `pretrain`: HuBERT or wav2vec 2.0 on a manifest.

A global batch gives the same update however it is split over ranks and micro-batches, with one exception, as in fairseq:
wav2vec 2.0's diversity term is that of each micro-batch (an entropy of a mean is not a sum over frames).
"""

import os
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config, PathStr, Split
from pretrain.data.batches import BatchConfig, SpeechBatches, SpeechTask
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.packing import pack
from pretrain.data.utterance import num_frames
from pretrain.model.encoder import EncoderConfig
from pretrain.objectives.collapse import AlarmConfig, Variation, hubert_alarm, variation_alarm, wav2vec2_alarm
from pretrain.objectives.hubert import Hubert, HubertBatch, HubertConfig, hubert_batch, perplexity
from pretrain.objectives.masking import span_mask
from pretrain.objectives.pnmi import pnmi_of_features
from pretrain.objectives.wav2vec2 import (
    Wav2Vec2,
    Wav2Vec2Batch,
    Wav2Vec2Config,
    draw_distractors,
    wav2vec2_batch,
)
from pretrain.progress import console
from pretrain.training.checkpoint import load_weights
from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.task import OptimizerConfig, TrainingConfig


class EvaluationConfig(Config):
    """PNMI of a layer's units at every validation, `valid_pnmi`: k-means on at most `max_seconds` of the valid split."""

    layer: int = Field(6, ge=0, description="after that layer's residual; 0 is the first layer's input")
    num_classes: int = Field(100, ge=2)
    max_seconds: float = Field(
        600.0,
        gt=0,
        description="of utterances with phones, drawn once; longer ones are cropped as in training",
    )


class PretrainConfig(Config):
    """Data, objective, architecture and training of an encoder."""

    out: PathStr
    manifest: PathStr
    split: Split = "train"
    valid_split: Split = Field(
        "dev", description='its loss is reported while training, if it is there; "": no validation'
    )
    objective: Literal["hubert", "wav2vec2"]
    labels: PathStr | None = Field(None, description="HuBERT's targets: a labels folder")
    init: PathStr | None = Field(
        None, description="start from the weights of this run, for example an earlier iteration"
    )
    encoder: EncoderConfig = EncoderConfig()
    hubert: HubertConfig = HubertConfig()
    wav2vec2: Wav2Vec2Config = Wav2Vec2Config()
    batches: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    alarm: AlarmConfig = AlarmConfig()
    evaluation: EvaluationConfig | None = Field(None, description="needs phone alignments in the valid split")

    @model_validator(mode="after")
    def _labels_belong_to_hubert(self) -> "PretrainConfig":
        if (self.objective == "hubert") != (self.labels is not None):
            raise ValueError('`labels` is needed for objective = "hubert" and only there')
        if self.evaluation is not None and self.evaluation.layer > self.encoder.num_layers:
            raise ValueError(
                f"evaluation.layer {self.evaluation.layer}: this encoder has layers 0 to {self.encoder.num_layers}"
            )
        return self


class PretrainTask(SpeechTask):
    """What both objectives share; `_draw` of a subclass adds its own targets."""

    model: Hubert | Wav2Vec2

    def __init__(self, config: PretrainConfig, manifest: Manifest):
        self.config = config
        seed = config.training.seed
        self.train_set = SpeechBatches(manifest.select(config.split), config.batches, seed)
        self.valid_set: SpeechBatches | None = None
        if config.valid_split is not None and config.valid_split in manifest.splits:
            self.valid_set = SpeechBatches(manifest.select(config.valid_split), config.batches, seed)
        elif config.valid_split is not None:
            have = ", ".join(sorted(manifest.splits)) or "no splits"
            _say(
                f"no validation: {manifest.folder} has no utterances of valid_split = {config.valid_split!r}; it has {have}"
            )
        self.judged = self._draw_aligned()

    def _draw_aligned(self) -> list[int]:
        """Utterances of the valid split to judge a layer by: with phones, in random order, up to `evaluation.max_seconds`."""
        if self.config.evaluation is None:
            return []
        chosen: list[int] = []
        seconds = 0.0
        if self.valid_set is not None and self.valid_set.manifest.has_phones:
            for item in (
                np.random.default_rng([self.config.training.seed, 4])
                .permutation(self.valid_set.items)
                .tolist()
            ):
                if seconds >= self.config.evaluation.max_seconds:
                    break
                if self.valid_set.manifest[item].phones:
                    chosen.append(item)
                    seconds += self.valid_set.seconds(np.array([item]))
        if not chosen:
            _say(
                f"no valid_pnmi: no utterance of valid_split = {self.config.valid_split!r} has phones (index with `alignments`)"
            )
        return chosen

    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    def evaluate(self) -> dict[str, float]:
        """`pnmi` of the configured layer."""
        if self.config.evaluation is None or not self.judged:
            return {}
        assert self.valid_set is not None
        device = next(self.model.parameters()).device
        pieces = []
        for item in self.judged:
            waveform, first = self.valid_set.load(item, self.valid_set.rng(item, -1))
            buffer, layout = pack([waveform])
            layers = self.model.encoder.extract_packed(
                buffer.to(device), layout, self.config.evaluation.layer
            )
            pieces.append((self.valid_set.manifest[item], first, layers[-1].float().cpu().numpy()))
        return {
            "pnmi": pnmi_of_features(pieces, self.config.evaluation.num_classes, self.config.training.seed)
        }

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
        if step < self.config.alarm.after_steps:
            return None
        return self._collapse(metrics, step) or variation_alarm(metrics, self.config.alarm)

    def _collapse(self, metrics: dict[str, float], step: int) -> str | None:
        raise NotImplementedError


class HubertTask(PretrainTask):
    """HuBERT: the targets are labels from a file, of several levels those of level 0."""

    def __init__(self, config: PretrainConfig, manifest: Manifest, labels: Labels):
        super().__init__(config, manifest)
        if labels.num_levels != 1:
            _say(
                f"labels: {labels.folder} has {labels.num_levels} levels; the targets are level 0, the plain codebook's classes"
            )
        self.labels = labels
        for batches in (self.train_set, self.valid_set):
            if batches is not None:
                check_label_counts(batches, labels)
        self.chance = _commonest_share(self.train_set, labels)
        if self.chance == 1.0 and config.alarm.perplexity:
            raise ValueError(
                f"labels: {labels.folder} has the same label for every frame of split {config.split!r}: there is nothing to learn. Is the "
                "audio silent? (alarm.perplexity = 0 trains nevertheless)"
            )
        self.model = Hubert(config.encoder, config.hubert, labels.num_classes)
        Variation(self.model)

    def _collate(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> HubertBatch:
        waveforms, masks, labels = [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveform, first = batches.load(item, rng)
            frames = num_frames(len(waveform))
            waveforms.append(waveform)
            masks.append(
                span_mask(
                    frames, self.config.hubert.mask_start_probability, self.config.hubert.mask_length, rng
                )
            )
            labels.append(self.labels.first_level(batches.manifest[item].id)[first : first + frames])
        return hubert_batch(waveforms, masks, labels)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        return {
            **super().describe(metrics),
            "prediction_perplexity": perplexity(metrics["_predicted"].numpy()),
        }

    def _collapse(self, metrics: dict[str, float], step: int) -> str | None:
        return hubert_alarm(metrics, step, self.config.alarm, self.chance, self.config.optimizer.warmup_steps)


class Wav2Vec2Task(PretrainTask):
    """wav2vec 2.0: the targets are the utterance's own quantised features."""

    def __init__(self, config: PretrainConfig, manifest: Manifest):
        super().__init__(config, manifest)
        self.model = Wav2Vec2(config.encoder, config.wav2vec2)
        Variation(self.model)

    def _collate(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> Wav2Vec2Batch:
        waveforms, masks, distractors = [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveform, _ = batches.load(item, rng)
            frames = num_frames(len(waveform))
            mask = span_mask(
                frames, self.config.wav2vec2.mask_start_probability, self.config.wav2vec2.mask_length, rng
            )
            waveforms.append(waveform)
            masks.append(mask)
            distractors.append(draw_distractors(int(mask.sum()), self.config.wav2vec2.num_distractors, rng))
        return wav2vec2_batch(waveforms, masks, distractors)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        assert isinstance(self.model, Wav2Vec2)
        self.model.set_step(step)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        perplexities = [perplexity(group) for group in metrics["_codes"].numpy()]
        return {**super().describe(metrics), "code_perplexity": float(np.mean(perplexities))}

    def _collapse(self, metrics: dict[str, float], step: int) -> str | None:
        config = self.config.wav2vec2
        return wav2vec2_alarm(metrics, self.config.alarm, config.num_entries, config.diversity_weight)


def check_label_counts(batches: SpeechBatches, labels: Labels) -> None:
    """Every utterance has labels and their number differs from its frames by at most one, or ValueError names it."""
    rows = batches.manifest.take(batches.items)
    labels.require_frames(rows.column("id"), rows.num_frames)


def _commonest_share(batches: SpeechBatches, labels: Labels, utterances: int = 500) -> float:
    """The share of the commonest label among `utterances` of the training set: what saying it always would get right."""
    counts = np.zeros(labels.num_classes, np.int64)
    for item in batches.items[:: max(1, len(batches.items) // utterances)].tolist():
        counts += np.bincount(labels.first_level(batches.manifest[item].id), minlength=labels.num_classes)
    return float(counts.max() / max(1, counts.sum()))


def initialize(model: Hubert | Wav2Vec2, run: str, codebook: str | None = None) -> str:
    """Load the weights of `run` (config key `init`) into `model`; returns their fingerprint.

    Two things may differ, and are said: a run that holds an encoder alone leaves the heads as they were drawn, and so do class
    embeddings of another number of classes or another codebook. Any other name or shape that does not fit is a ValueError.
    """
    weights, meta, fingerprint = load_weights(run)
    own = model.state_dict()
    fresh: list[str] = []
    if all(name.startswith("encoder.") for name in weights):
        fresh = [name for name in own if not name.startswith("encoder.")]
    elif "class_embeddings" in own and "class_embeddings" in weights:
        theirs, other = weights["class_embeddings"], meta.get("codebook") not in (None, codebook)
        if theirs.shape[1:] == own["class_embeddings"].shape[1:] and (
            other or len(theirs) != len(own["class_embeddings"])
        ):
            fresh = ["class_embeddings"]
    if fresh:
        _say(f"init: {run} gives no {', '.join(fresh)} for this run; drawn anew")
    weights = {name: tensor for name, tensor in weights.items() if name not in fresh}
    problems = [f"{name} is missing there" for name in own if name not in weights and name not in fresh]
    problems += [f"{name} is not part of this model" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"init: the weights of {run} do not fit: {'; '.join(problems[:8])}{more}. `objective`, `encoder` and the head's sizes must "
            "be those of that run"
        )
    model.load_state_dict(weights, strict=False)
    return fingerprint


def _say(text: str) -> None:
    """A line on stderr, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False, highlight=False, soft_wrap=True)


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
    if config.init is not None:
        parents["init"] = initialize(task.model, config.init, extra.get("codebook"))
    summary = train(
        Run(
            task,
            out=config.out,
            kind="encoder",
            training=config.training,
            optimizer=config.optimizer,
            config=config.resolved(),
            parents=parents,
            extra=extra,
        )
    )
    return {
        **summary,
        "parameters": num_parameters(task.model),
        "utterances_left_out": task.train_set.num_left_out,
    }


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())
