"""The two objectives frame by frame, as the papers write them: loops, in float64."""

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def cross_entropy(positive: float, negatives: list[float]) -> float:
    """Minus the log probability of the positive in a softmax over it and the negatives."""
    highest = max([positive, *negatives])
    return math.log(sum(math.exp(score - highest) for score in [positive, *negatives])) + highest - positive


def hubert_loss(projected: Tensor, embeddings: Tensor, labels: Tensor, mask: Tensor, temperature: float) -> tuple[float, int, int]:
    """HuBERT, equation 3: frame against its class and all classes as negatives, the positive's duplicate at minus infinity.

    projected (batch, frames, dim), embeddings (classes, dim), labels (batch, frames; negative where unknown), mask (batch,
    frames). Returns the loss summed over masked frames, how many they are and how many are predicted right.
    """
    projected, embeddings = projected.double(), embeddings.double()
    total, count, correct = 0.0, 0, 0
    for i in range(len(projected)):
        for t in range(projected.shape[1]):
            if not mask[i, t] or labels[i, t] < 0:
                continue
            positive = cosine(projected[i, t], embeddings[labels[i, t]]) / temperature
            negatives = []
            for number, embedding in enumerate(embeddings):
                duplicate = number == int(labels[i, t])
                negatives.append(-math.inf if duplicate else cosine(projected[i, t], embedding) / temperature)
            total += cross_entropy(positive, negatives)
            correct += positive > max(negatives)
            count += 1
    return total, count, correct


def contrastive_loss(
    projected: Tensor, targets: Tensor, codes: Tensor, mask: Tensor, distractors: list[Tensor], temperature: float
) -> tuple[float, int, int]:
    """wav2vec 2.0, equation 3: a masked frame's own quantised target among those of other masked frames of the utterance.

    projected and targets (batch, frames, dim), codes (batch, frames, groups), distractors[i] (masked, K) as places among the
    masked frames. A distractor with the positive's codes is at minus infinity.
    """
    projected, targets = projected.double(), targets.double()
    total, count, correct = 0.0, 0, 0
    for i in range(len(projected)):
        frames = torch.where(mask[i])[0].tolist()
        for place, t in enumerate(frames):
            positive = cosine(projected[i, t], targets[i, t]) / temperature
            negatives = []
            for other in distractors[i][place].tolist():
                u = frames[other]
                same = bool((codes[i, u] == codes[i, t]).all())
                negatives.append(-math.inf if same else cosine(projected[i, t], targets[i, u]) / temperature)
            total += cross_entropy(positive, negatives)
            correct += positive > max(negatives)
            count += 1
    return total, count, correct


def diversity(soft: Tensor) -> float:
    """Equation 4 as fairseq computes it: (G V - sum over groups of the perplexity of the mean distribution) / (G V)."""
    num_frames, groups, entries = soft.shape
    perplexities = 0.0
    for g in range(groups):
        mean = [float(soft[:, g, v].double().sum()) / num_frames for v in range(entries)]
        perplexities += math.exp(-sum(p * math.log(p + 1e-7) for p in mean))
    return (groups * entries - perplexities) / (groups * entries)
