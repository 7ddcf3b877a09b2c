"""wav2vec 2.0: find the quantised true frame among distractors (Baevski et al., 2020, arXiv 2006.11477)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.data.batches import SpeechBatches
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.operations import dropout
from pretrain.objectives.collapse import AlarmConfig, variations
from pretrain.objectives.masking import span_mask
from pretrain.objectives.penalty import feature_penalty, weigh_frames
from pretrain.objectives.pnmi import perplexity
from pretrain.objectives.task import PretrainTask
from pretrain.training.task import Loss


class Wav2Vec2Config(Config):
    """The paper's settings."""

    mask_start_probability: float = Field(0.065, gt=0, lt=1)
    mask_length: int = Field(10, ge=1)
    num_distractors: int = Field(100, ge=1)
    num_groups: int = Field(2, ge=1)
    num_entries: int = Field(320, ge=2, description="codebook entries a group")
    code_dim: int = Field(256, ge=1)
    final_dim: int = Field(256, ge=1)
    feature_dropout: float = Field(0.1, ge=0, lt=1, description="on the quantiser's input")
    temperature: float = Field(0.1, gt=0, description="of the contrastive softmax")
    gumbel_temperature: tuple[float, float] = (2.0, 0.5)
    gumbel_decay: float = Field(0.999995, gt=0, le=1, description="per step")
    diversity_weight: float = Field(0.1, ge=0)
    feature_penalty: float = Field(10.0, ge=0)

    @model_validator(mode="after")
    def _check_divisibility(self) -> "Wav2Vec2Config":
        if self.code_dim % self.num_groups:
            raise ValueError(f"code_dim {self.code_dim} is not a multiple of num_groups {self.num_groups}")
        return self


class Wav2Vec2Batch(NamedTuple):
    """A packed batch with masks and distractors. Frames are numbered through the batch."""

    waveforms: Tensor  # (samples,) float32
    layout: Layout
    num_masked: tuple[int, ...]  # of each utterance
    mask: Tensor  # (frames,) bool
    masked: Tensor  # (masked,) int64: the masked frames
    distractors: Tensor  # (masked, distractors) int64: places among the utterance's own masked frames
    penalty_weights: Tensor  # (frames,) float32: the utterance's masked frames by all of its frames


def wav2vec2_batch(
    waveforms: Sequence[np.ndarray], masks: Sequence[np.ndarray], distractors: Sequence[np.ndarray]
) -> Wav2Vec2Batch:
    """Pack utterances: waveforms (samples_i,), masks (frames_i,) bool, distractors (masked_i, count)."""
    buffer, layout = pack(waveforms)
    mask, num_masked = np.concatenate(masks), tuple(int(mask.sum()) for mask in masks)
    weights = weigh_frames(np.array(num_masked), layout)
    arrays = (mask, np.flatnonzero(mask), np.concatenate(distractors), weights)
    return Wav2Vec2Batch(buffer, layout, num_masked, *map(torch.from_numpy, arrays))


def draw_distractors(num_masked: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """For each masked frame `count` of the utterance's others, with replacement: (num_masked, count).

    A frame that is masked alone is its own distractor, which the loss sets to minus infinity: nothing is left
    to contrast.
    """
    drawn = rng.integers(0, max(1, num_masked - 1), (num_masked, count))
    return drawn + (drawn >= np.arange(num_masked)[:, None]) if num_masked > 1 else drawn


class GumbelQuantizer(nn.Module):
    """Product quantisation with a straight-through Gumbel softmax (equation 1). Codes are (…, groups)."""

    def __init__(self, dim: int, config: Wav2Vec2Config):
        super().__init__()
        self.groups, self.entries = config.num_groups, config.num_entries
        self.temperature = config.gumbel_temperature[0]
        self.logits = nn.Linear(dim, self.groups * self.entries)
        nn.init.normal_(self.logits.weight, std=1.0)  # as fairseq: sharp logits from the start
        nn.init.zeros_(self.logits.bias)
        self.codes = nn.Parameter(
            torch.empty(self.groups, self.entries, config.code_dim // self.groups).uniform_()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (n, dim) to (n, code_dim), codes (n, groups) and probabilities (n, groups, entries)."""
        logits = self.logits(x).float().unflatten(1, (self.groups, self.entries))
        if self.training:
            chosen = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=2)
        else:
            chosen = F.one_hot(logits.argmax(2), self.entries).float()
        quantized = torch.einsum("nge,ged->ngd", chosen, self.codes).flatten(1)
        return quantized, chosen.argmax(2), logits.softmax(2)


class Wav2Vec2(nn.Module):
    """Contrastive loss, diversity loss and feature penalty (section 3.2).

    The contrastive loss gathers distractors from one similarity matrix per utterance.
    """

    def __init__(self, encoder: EncoderConfig, config: Wav2Vec2Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(encoder)
        self.quantizer = GumbelQuantizer(self.encoder.front_end.dim, config)
        self.project_code = nn.Linear(config.code_dim, config.final_dim)
        self.project = nn.Linear(encoder.dim, config.final_dim)

    def set_step(self, step: int) -> None:
        first, last = self.config.gumbel_temperature
        self.quantizer.temperature = max(last, first * self.config.gumbel_decay**step)

    def forward(self, batch: Wav2Vec2Batch) -> Loss:
        encoded = self.encoder.encode(batch.waveforms, batch.layout, batch.mask)
        context, local = (x.index_select(0, batch.masked) for x in (encoded.last, encoded.normed))
        predicted = self.project(context)  # (masked, final_dim)
        local = dropout(local, self.config.feature_dropout, self.training)  # (masked, front_end.dim)
        targets, codes, soft = self.quantizer(local)
        losses, correct = self._contrast(predicted, self.project_code(targets), codes, batch)
        loss, count = losses.sum(), losses.new_full((), len(losses))
        usage = soft.sum(0) / max(1, len(soft))  # (groups, entries): each entry's share of the batch
        soft_perplexity = torch.exp(-(usage * (usage + 1e-7).log()).sum(1)).sum()
        size = self.config.num_groups * self.config.num_entries
        diversity = (size - soft_perplexity) / size
        total = loss + self.config.diversity_weight * count * diversity
        total = total + feature_penalty(encoded.features, batch.penalty_weights, self.config.feature_penalty)
        hard = torch.zeros_like(usage).scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=usage.dtype))
        metrics = {
            "contrastive_loss": (loss.detach(), count),
            "accuracy": (correct, count),
            "diversity_loss": ((diversity * count).detach(), count),
            "_codes": (hard, count),
            **variations(batch.waveforms, encoded.features, context, self.training),
        }
        return Loss(total, count, metrics)

    def _contrast(
        self, predicted: Tensor, targets: Tensor, codes: Tensor, batch: Wav2Vec2Batch
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy (masked,) of the true target among the distractors, and the number of hits."""
        with torch.autocast(predicted.device.type, enabled=False):
            predicted = F.normalize(predicted.float(), dim=1) / self.config.temperature
            targets = F.normalize(targets.float(), dim=1)
            choices = []
            inputs = (predicted, targets, codes, batch.distractors)
            for query, key, code, others in zip(*(x.split(batch.num_masked) for x in inputs), strict=True):
                logits = query @ key.T  # (masked, masked) of one utterance
                # A distractor with the true frame's codes is no distractor.
                same = (code[:, None] == code[None]).all(2)
                negatives = logits.masked_fill(same, float("-inf")).gather(1, others)  # (masked, distractors)
                choices.append(torch.cat([logits.diagonal()[:, None], negatives], dim=1))
        logits = torch.cat(choices)
        fixed = logits.detach()
        correct = fixed[:, 1:].max(1).values < fixed[:, 0]
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, labels, reduction="none"), correct.sum().float()


class Wav2Vec2Task(PretrainTask):
    """The targets are the utterance's own quantised features."""

    config_class = Wav2Vec2Config
    model: Wav2Vec2

    def build(self) -> Wav2Vec2:
        return Wav2Vec2(self.config.encoder, self.table)

    def load(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> Wav2Vec2Batch:
        table, waveforms, masks, distractors = self.table, [], [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveforms.append(batches.load(item, rng)[0])
            frames = num_frames(len(waveforms[-1]))
            masks.append(span_mask(frames, table.mask_start_probability, table.mask_length, rng))
            distractors.append(draw_distractors(int(masks[-1].sum()), table.num_distractors, rng))
        return wav2vec2_batch(waveforms, masks, distractors)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.model.set_step(step)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        perplexities = [perplexity(group) for group in metrics["_codes"].numpy()]
        return {**super().describe(metrics), "code_perplexity": float(np.mean(perplexities))}

    def collapse(self, metrics: dict[str, float], step: int) -> str | None:
        table = self.table
        return wav2vec2_alarm(metrics, self.config.alarm, table.num_entries, table.diversity_weight)


def wav2vec2_alarm(
    metrics: dict[str, float], config: AlarmConfig, num_entries: int, diversity_weight: float
) -> str | None:
    """The message for one code for everything, or for nearly always right among withered codes."""
    value, accuracy = metrics["code_perplexity"], metrics["accuracy"]
    found = f"code_perplexity is {value:.2f}, below alarm"
    remedies = (
        f"Try a higher wav2vec2.diversity_weight (now {diversity_weight:g}), a lower optimizer.lr, a larger "
        "batch (batches.batch_seconds, with training.accumulate to fit it) or fewer wav2vec2.num_entries "
        f"(now {num_entries})"
    )
    if value < config.perplexity:
        return f"collapsed: {found}.perplexity = {config.perplexity}: one code is left. {remedies}"
    limit, withered = config.contrastive_accuracy, value < config.code_share * num_entries
    if limit and accuracy >= limit and withered:
        return (
            f"collapsed: accuracy is {accuracy:.3f}, from alarm.contrastive_accuracy = {limit} on, while "
            f"{found}.code_share ({config.code_share}) of {num_entries} entries: distractors with the true "
            f"frame's codes do not count, so few codes make the task trivial. {remedies}"
        )
    return None
