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
    """The paper's settings; `unmasked_weight` is its (1 - alpha) / alpha."""

    mask_start_probability: float = Field(0.08, gt=0, lt=1)
    mask_length: int = Field(10, ge=1)
    final_dim: int = Field(256, ge=1)
    temperature: float = Field(0.1, gt=0)
    unmasked_weight: float = Field(0.0, ge=0, description="weight of the loss on frames that are not masked")
    feature_penalty: float = Field(10.0, ge=0)


class HubertBatch(NamedTuple):
    """A padded batch with masks and targets."""

    waveforms: Tensor  # (batch, samples) float32
    num_samples: Tensor  # (batch,)
    mask: Tensor  # (batch, frames) bool, False where padded
    labels: Tensor  # (batch, frames) int64, IGNORED where padded


class Hubert(nn.Module):
    """Cosine similarity of projected frames with one embedding per class, over a temperature; cross entropy (equation 3).

    "Positive and all other classes as negatives" is a softmax over the classes, so one normalised matrix product gives the
    logits. Returns the loss summed over masked frames. What is a mean in the paper (the penalty on the front end's features, the
    loss on frames that are not masked) is an utterance's mean times its number of masked frames, so that every term is a sum
    over utterances and no split of a batch changes it.
    """

    def __init__(self, encoder: EncoderConfig, config: HubertConfig, num_classes: int):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.encoder = Encoder(encoder)
        self.project = nn.Linear(encoder.dim, config.final_dim)
        self.class_embeddings = nn.Parameter(torch.randn(num_classes, config.final_dim))

    def forward(self, batch: HubertBatch) -> Loss:
        features = self.encoder.features(batch.waveforms, batch.num_samples)  # (batch, frames, front_end.dim)
        x = self.encoder.contextualize(self.encoder.feature_norm(features), batch.num_samples, batch.mask)
        known = batch.labels != IGNORED
        masked = batch.mask & known
        losses, correct, histogram = self._predict(x[masked], batch.labels[masked])
        counts = masked.sum(1).float()  # (batch,)
        loss, count = losses.sum(), counts.sum()
        total = loss + feature_penalty(features, known, counts, self.config.feature_penalty)
        metrics = {"prediction_loss": (loss.detach(), count), "accuracy": (correct, count), "_predicted": (histogram, count)}
        if self.config.unmasked_weight > 0:
            seen = known & ~batch.mask
            seen_losses, seen_correct, _ = self._predict(x[seen], batch.labels[seen])
            weights = (counts / seen.sum(1).clamp(min=1))[:, None].expand(seen.shape)  # (batch, frames)
            total = total + self.config.unmasked_weight * (seen_losses * weights[seen]).sum()
            metrics["accuracy_unmasked"] = (seen_correct, seen.sum().float())
        return Loss(total, count, metrics)

    def _predict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (n, dim) and labels (n,) to the losses (n,), the number right, and how often each class is predicted."""
        query = F.normalize(self.project(x).float(), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            logits = query @ F.normalize(self.class_embeddings.float(), dim=1).T / self.config.temperature  # (n, classes)
        predicted = logits.detach().argmax(1)
        histogram = torch.zeros(self.num_classes, device=x.device).index_add_(
            0, predicted, torch.ones_like(predicted, dtype=torch.float)
        )
        return F.cross_entropy(logits, labels, reduction="none"), (predicted == labels).sum().float(), histogram


def feature_penalty(features: Tensor, valid: Tensor, counts: Tensor, weight: float) -> Tensor:
    """wav2vec 2.0's L2 penalty: `weight` times each utterance's mean square feature times its `counts`; 0 for a fixed front end.

    features (batch, frames, channels), valid (batch, frames) bool, counts (batch,): masked frames. Summed over the batch.
    """
    if weight == 0 or not features.requires_grad:
        return features.new_zeros(())
    square = features.float().square().mean(2)  # (batch, frames)
    return weight * (counts * (square * valid).sum(1) / valid.sum(1).clamp(min=1)).sum()


def perplexity(histogram: np.ndarray) -> float:
    """2 to the entropy in bits of a histogram: how many classes are in effective use."""
    p = histogram[histogram > 0] / histogram.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
