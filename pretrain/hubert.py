"""HuBERT: predict the cluster of masked frames (Hsu et al., 2021, arXiv 2106.07447, section II)."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.encoder import Encoder, EncoderConfig
from pretrain.engine import Loss

IGNORED = -100


class HubertConfig(Config):
    mask_start_probability: float = Field(0.08, gt=0, lt=1)
    mask_length: int = Field(10, ge=1)
    final_dim: int = Field(256, ge=1)
    temperature: float = Field(0.1, gt=0)
    unmasked_weight: float = Field(0.0, ge=0, description="weight of the loss on frames that are not masked (1 - alpha in the paper)")
    feature_penalty: float = Field(10.0, ge=0)


class HubertBatch(NamedTuple):
    waveforms: Tensor  # (batch, samples) float32
    num_samples: Tensor  # (batch,)
    mask: Tensor  # (batch, frames) bool, False where padded
    labels: Tensor  # (batch, frames) int64, IGNORED where padded


class Hubert(nn.Module):
    """Cosine similarity of projected frames with one embedding per class, over a temperature; cross entropy (equation 3).

    "Positive and all other classes as negatives" is a softmax over the classes, so one normalised matrix product gives the
    logits. Returns the loss summed over masked frames; the penalty is the mean squared front-end feature times their number.
    """

    def __init__(self, encoder: EncoderConfig, config: HubertConfig, num_classes: int):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.encoder = Encoder(encoder)
        self.project = nn.Linear(encoder.dim, config.final_dim)
        self.class_embeddings = nn.Parameter(torch.empty(num_classes, config.final_dim).uniform_())

    def forward(self, batch: HubertBatch) -> Loss:
        features = self.encoder.features(batch.waveforms, batch.num_samples)  # (batch, frames, front_end.dim)
        x = self.encoder.contextualize(self.encoder.feature_norm(features), batch.num_samples, batch.mask)
        known = batch.labels != IGNORED
        masked = batch.mask & known
        loss, correct, histogram = self._predict(x[masked], batch.labels[masked])
        count = masked.sum().float()
        total = loss + feature_penalty(features, known, count, self.config.feature_penalty)
        metrics = {"prediction_loss": (loss.detach(), count), "accuracy": (correct, count), "_predicted": (histogram, count)}
        if self.config.unmasked_weight > 0:
            seen = known & ~batch.mask
            seen_loss, seen_correct, _ = self._predict(x[seen], batch.labels[seen])
            seen_count = seen.sum().float()
            total = total + self.config.unmasked_weight * seen_loss * (count / seen_count.clamp(min=1))
            metrics["accuracy_unmasked"] = (seen_correct, seen_count)
        return Loss(total, count, metrics)

    def _predict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (n, dim) and labels (n,) to the summed loss, the number right, and how often each class is predicted."""
        query = F.normalize(self.project(x).float(), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            logits = query @ F.normalize(self.class_embeddings.float(), dim=1).T / self.config.temperature  # (n, classes)
        predicted = logits.detach().argmax(1)
        histogram = torch.zeros(self.num_classes, device=x.device).index_add_(0, predicted, torch.ones_like(predicted, dtype=torch.float))
        return F.cross_entropy(logits, labels, reduction="sum"), (predicted == labels).sum().float(), histogram


def feature_penalty(features: Tensor, valid: Tensor, count: Tensor, weight: float) -> Tensor:
    """`weight` times the mean square of the front end's valid features (wav2vec 2.0's L2 penalty), times `count`; 0 if fixed."""
    if weight == 0 or not features.requires_grad:
        return features.new_zeros(())
    square = features.float().square().mean(2)  # (batch, frames)
    return weight * count * (square * valid).sum() / valid.sum()


def perplexity(histogram: np.ndarray) -> float:
    """2 to the entropy in bits of a histogram: how many classes are in effective use."""
    p = histogram[histogram > 0] / histogram.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
