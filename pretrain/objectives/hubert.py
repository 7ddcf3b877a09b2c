"""HuBERT: predict the cluster of masked frames (Hsu et al., 2021, arXiv 2106.07447, section II)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.data.batches import SpeechBatches
from pretrain.data.labels import Labels
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.collapse import AlarmConfig, variations
from pretrain.objectives.masking import span_mask
from pretrain.objectives.penalty import feature_penalty, weigh_frames
from pretrain.objectives.pnmi import perplexity
from pretrain.objectives.task import PretrainTask, say
from pretrain.training.task import Loss


class HubertConfig(Config):
    """The paper's settings; `unmasked_weight` is its (1 - alpha) / alpha, but of a mean (see `Hubert`)."""

    mask_start_probability: float = Field(0.08, gt=0, lt=1)
    mask_length: int = Field(10, ge=1)
    final_dim: int = Field(256, ge=1)
    temperature: float = Field(0.1, gt=0)
    unmasked_weight: float = Field(0.0, ge=0, description="weight of the loss on frames that are not masked")
    feature_penalty: float = Field(10.0, ge=0)


class HubertBatch(NamedTuple):
    """A packed batch with masks and targets. Frames are numbered through the batch."""

    waveforms: Tensor  # (samples,) float32
    layout: Layout
    mask: Tensor  # (frames,) bool
    masked: Tensor  # (masked,) int64: the masked frames that have a label
    masked_labels: Tensor  # (masked,) int64
    unmasked: Tensor  # (unmasked,) int64: the other frames that have a label
    unmasked_labels: Tensor  # (unmasked,) int64
    unmasked_weights: Tensor  # (unmasked,) float32: the utterance's masked frames by its unmasked ones
    penalty_weights: Tensor  # (frames,) float32: the utterance's masked frames by all of its frames


def hubert_batch(
    waveforms: Sequence[np.ndarray], masks: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> HubertBatch:
    """Pack utterances: waveforms (samples_i,), masks (frames_i,) bool, labels (up to frames_i,) integer.

    Frames at the end of an utterance that have no label are no targets.
    """
    buffer, layout = pack(waveforms)
    target = np.full(layout.total_frames, -1, np.int64)
    for (first, _), known in zip(layout.frame_bounds, labels, strict=True):
        target[first : first + len(known)] = known
    mask = np.concatenate(masks)
    masked, unmasked = np.flatnonzero(mask & (target >= 0)), np.flatnonzero(~mask & (target >= 0))
    owner = np.repeat(np.arange(len(waveforms)), layout.num_frames)
    num_masked, num_unmasked = (np.bincount(owner[rows], minlength=len(masks)) for rows in (masked, unmasked))
    weights = (num_masked / np.maximum(num_unmasked, 1))[owner[unmasked]].astype(np.float32)
    targets = (masked, target[masked], unmasked, target[unmasked])
    arrays = (mask, *targets, weights, weigh_frames(num_masked, layout))
    return HubertBatch(buffer, layout, *map(torch.from_numpy, arrays))


class Hubert(nn.Module):
    """Cross entropy of the cosine similarity of projected frames with class embeddings (equation 3).

    "Positive and all other classes as negatives" is a softmax over the classes, so one normalised matrix
    product gives the logits. Returns the loss summed over masked frames. The loss on frames that are not
    masked, which the paper sums, is here an utterance's mean times its number of masked frames, like the
    penalty on features: every term is a sum over utterances, and no split of a batch changes it.
    """

    def __init__(self, encoder: EncoderConfig, config: HubertConfig, num_classes: int):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.encoder = Encoder(encoder)
        self.project = nn.Linear(encoder.dim, config.final_dim)
        self.class_embeddings = nn.Parameter(torch.randn(num_classes, config.final_dim))

    def forward(self, batch: HubertBatch) -> Loss:
        encoded = self.encoder.encode(batch.waveforms, batch.layout, batch.mask)
        masked = encoded.last.index_select(0, batch.masked)  # (masked, dim)
        losses, correct, histogram = self._predict(masked, batch.masked_labels)
        loss, count = losses.sum(), losses.new_full((), len(losses))
        total = loss + feature_penalty(encoded.features, batch.penalty_weights, self.config.feature_penalty)
        metrics = {
            "prediction_loss": (loss.detach(), count),
            "accuracy": (correct, count),
            "_predicted": (histogram, count),
            **variations(batch.waveforms, encoded.features, masked, self.training),
        }
        if self.config.unmasked_weight > 0:
            unmasked = encoded.last.index_select(0, batch.unmasked)
            losses, correct, _ = self._predict(unmasked, batch.unmasked_labels)
            total = total + self.config.unmasked_weight * (losses * batch.unmasked_weights).sum()
            metrics["accuracy_unmasked"] = (correct, losses.new_full((), len(losses)))
        return Loss(total, count, metrics)

    def _predict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (n, dim) and labels (n,) to losses (n,), the number of hits, and predictions by class."""
        query = F.normalize(self.project(x).float(), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            similarity = query @ F.normalize(self.class_embeddings.float(), dim=1).T
            logits = similarity / self.config.temperature  # (n, classes)
        predicted = logits.detach().argmax(1)
        histogram = torch.zeros(self.num_classes, device=x.device)
        histogram.index_add_(0, predicted, torch.ones_like(predicted, dtype=torch.float))
        hits = (predicted == labels).sum().float()
        return F.cross_entropy(logits, labels, reduction="none"), hits, histogram


class HubertTask(PretrainTask):
    """The targets are labels from a file, of several levels those of level 0."""

    config_class = HubertConfig
    needs_labels = True
    class_weights = ("class_embeddings",)

    labels: Labels

    def build(self) -> Hubert:
        labels, config = self.labels, self.config
        if labels.num_levels != 1:
            say(
                f"labels: {labels.folder} has {labels.num_levels} levels; the targets are level 0, the plain "
                "codebook's classes"
            )
        for batches in (self.train_set, self.valid_set):
            if batches is not None:
                check_label_counts(batches, labels)
        self.chance = _commonest_share(self.train_set, labels)
        if self.chance == 1.0 and config.alarm.perplexity:
            raise ValueError(
                f"labels: {labels.folder} has the same label for every frame of split {config.split!r}: "
                "there is nothing to learn. Is the audio silent? (alarm.perplexity = 0 trains nevertheless)"
            )
        return Hubert(config.encoder, self.table, labels.num_classes)

    def load(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> HubertBatch:
        table, waveforms, masks, labels = self.table, [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveform, first = batches.load(item, rng)
            frames = num_frames(len(waveform))
            waveforms.append(waveform)
            masks.append(span_mask(frames, table.mask_start_probability, table.mask_length, rng))
            labels.append(self.labels.first_level(batches.manifest[item].id)[first : first + frames])
        return hubert_batch(waveforms, masks, labels)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        used = perplexity(metrics["_predicted"].numpy())
        return {**super().describe(metrics), "prediction_perplexity": used}

    def collapse(self, metrics: dict[str, float], step: int) -> str | None:
        return hubert_alarm(metrics, step, self.config.alarm, self.chance, self.config.optimizer.warmup_steps)


def hubert_alarm(
    metrics: dict[str, float], step: int, config: AlarmConfig, chance: float, warmup_steps: int
) -> str | None:
    """The message for one predicted class, or for no better than the commonest label long after the warm-up.

    `chance` is the commonest label's share.
    """
    value = metrics["prediction_perplexity"]
    if value < config.perplexity:
        return (
            f"collapsed: prediction_perplexity is {value:.2f}, below alarm.perplexity = {config.perplexity}: "
            "one class is predicted for nearly all frames. Try a lower optimizer.lr, a longer "
            "optimizer.warmup_steps, optimizer.clip_norm = 1.0, or look whether the labels themselves use "
            "their classes (`wordless measure`)"
        )
    accuracy, limit = metrics["accuracy"], min(config.chance_ratio * chance, (1 + chance) / 2)
    if config.chance_steps and step >= warmup_steps + config.chance_steps and accuracy < limit:
        return (
            f"collapsed: accuracy is {accuracy:.4f}, below {limit:.4f}: alarm.chance_ratio "
            f"({config.chance_ratio}) times the share of the commonest label, or half way from there to 1, "
            f"{config.chance_steps} steps (alarm.chance_steps) after the warm-up. Try a lower optimizer.lr "
            "with a longer optimizer.warmup_steps, a lower hubert.mask_start_probability, or encode the "
            "labels again from this manifest: labels of other audio cannot be learned"
        )
    return None


def check_label_counts(batches: SpeechBatches, labels: Labels) -> None:
    """Raises ValueError if an utterance has no labels, or over one too many or too few for its frames."""
    rows = batches.manifest.take(batches.items)
    labels.require_frames(rows.column("id"), rows.num_frames)


def _commonest_share(batches: SpeechBatches, labels: Labels, utterances: int = 500) -> float:
    """The commonest label's share among `utterances` of the training set."""
    counts = np.zeros(labels.num_classes, np.int64)
    for item in batches.items[:: max(1, len(batches.items) // utterances)].tolist():
        counts += np.bincount(labels.first_level(batches.manifest[item].id), minlength=labels.num_classes)
    return float(counts.max() / max(1, counts.sum()))
