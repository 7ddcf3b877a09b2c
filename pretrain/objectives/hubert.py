"""HuBERT: predict the cluster of masked frames (Hsu et al., 2021, arXiv 2106.07447, section II)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.data.packing import Layout, pack
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.objectives.pnmi import entropy_bits
from pretrain.training.task import Loss


class HubertConfig(Config):
    """The paper's settings; `unmasked_weight` is its (1 - alpha) / alpha, but for the mean that `Hubert` takes."""

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
    seen: Tensor  # (seen,) int64: the other frames that have a label
    seen_labels: Tensor  # (seen,) int64
    seen_weights: Tensor  # (seen,) float32: the utterance's masked frames for each of its seen ones
    penalty_weights: Tensor  # (frames,) float32: the utterance's masked frames for each of its frames


def hubert_batch(
    waveforms: Sequence[np.ndarray], masks: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> HubertBatch:
    """Pack utterances: waveforms (samples_i,), masks (frames_i,) bool, labels (up to frames_i,) integer; frames that lack a label
    at the end of an utterance are no targets."""
    buffer, layout = pack(waveforms)
    target = np.full(layout.total_frames, -1, np.int64)
    for (first, _), known in zip(layout.frame_bounds, labels, strict=True):
        target[first : first + len(known)] = known
    mask = np.concatenate(masks)
    masked, seen = np.flatnonzero(mask & (target >= 0)), np.flatnonzero(~mask & (target >= 0))
    owner = np.repeat(np.arange(len(waveforms)), layout.num_frames)
    counts = [np.bincount(owner[frames], minlength=len(waveforms)) for frames in (masked, seen)]
    seen_weights = (counts[0] / np.maximum(counts[1], 1))[owner[seen]]
    arrays = (
        mask,
        masked,
        target[masked],
        seen,
        target[seen],
        seen_weights.astype(np.float32),
        weigh_frames(counts[0], layout),
    )
    return HubertBatch(buffer, layout, *map(torch.from_numpy, arrays))


def weigh_frames(num_masked: np.ndarray, layout: Layout) -> np.ndarray:
    """Each utterance's number of masked frames, spread evenly over its frames: (frames,) float32, for `feature_penalty`."""
    return np.repeat(num_masked / np.array(layout.num_frames), layout.num_frames).astype(np.float32)


class Hubert(nn.Module):
    """Cosine similarity of projected frames with one embedding per class, over a temperature; cross entropy (equation 3).

    "Positive and all other classes as negatives" is a softmax over the classes, so one normalised matrix product gives the
    logits. Returns the loss summed over masked frames. The penalty on the front end's features, a mean in the paper, and, by our own
    choice, the loss on frames that are not masked (the paper sums it) are an utterance's mean times its number of masked frames, so
    that every term is a sum over utterances and no split of a batch changes it.
    """

    def __init__(self, encoder: EncoderConfig, config: HubertConfig, num_classes: int):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.encoder = Encoder(encoder)
        self.project = nn.Linear(encoder.dim, config.final_dim)
        self.class_embeddings = nn.Parameter(torch.randn(num_classes, config.final_dim))

    def forward(self, batch: HubertBatch) -> Loss:
        features = self.encoder.features(batch.waveforms, batch.layout)  # (frames, front_end.dim)
        x = self.encoder.contextualize(self.encoder.feature_norm(features), batch.layout, batch.mask)
        losses, correct, histogram = self._predict(x.index_select(0, batch.masked), batch.masked_labels)
        loss, count = losses.sum(), losses.new_full((), len(losses))
        total = loss + feature_penalty(features, batch.penalty_weights, self.config.feature_penalty)
        metrics = {
            "prediction_loss": (loss.detach(), count),
            "accuracy": (correct, count),
            "_predicted": (histogram, count),
        }
        if self.config.unmasked_weight > 0:
            seen_losses, seen_correct, _ = self._predict(x.index_select(0, batch.seen), batch.seen_labels)
            total = total + self.config.unmasked_weight * (seen_losses * batch.seen_weights).sum()
            metrics["accuracy_unmasked"] = (seen_correct, losses.new_full((), len(seen_losses)))
        return Loss(total, count, metrics)

    def _predict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (n, dim) and labels (n,) to the losses (n,), the number right, and how often each class is predicted."""
        query = F.normalize(self.project(x).float(), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            logits = (
                query @ F.normalize(self.class_embeddings.float(), dim=1).T / self.config.temperature
            )  # (n, classes)
        predicted = logits.detach().argmax(1)
        histogram = torch.zeros(self.num_classes, device=x.device).index_add_(
            0, predicted, torch.ones_like(predicted, dtype=torch.float)
        )
        return (
            F.cross_entropy(logits, labels, reduction="none"),
            (predicted == labels).sum().float(),
            histogram,
        )


def feature_penalty(features: Tensor, weights: Tensor, scale: float) -> Tensor:
    """wav2vec 2.0's L2 penalty: `scale` times the frames' mean square features (frames, channels) summed with `weights` (frames,);
    0 for a fixed front end. An utterance's weights sum to its number of masked frames."""
    if scale == 0 or not features.requires_grad:
        return features.new_zeros(())
    return scale * (features.float().square().mean(1) * weights).sum()  # no product that autocast would round


def perplexity(histogram: np.ndarray) -> float:
    """2 to the entropy in bits of a histogram: how many classes are in effective use."""
    return float(2 ** entropy_bits(histogram))
