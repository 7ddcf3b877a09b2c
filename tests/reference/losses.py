"""The two objectives frame by frame, as the papers write them: loops, in float64. Every argument is one
tensor an utterance."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def cross_entropy(positive: float, negatives: list[float]) -> float:
    """Minus the log probability of the positive in a softmax over it and the negatives."""
    highest = max([positive, *negatives])
    return math.log(sum(math.exp(score - highest) for score in [positive, *negatives])) + highest - positive


def hubert_loss(
    projected: Sequence[Tensor],
    embeddings: Tensor,
    labels: Sequence[Tensor],
    masks: Sequence[Tensor],
    temperature: float,
) -> tuple[float, int, int]:
    """HuBERT, equation 3: frame against its class and all classes as negatives, the positive's duplicate at
    minus infinity.

    projected[i] (frames, dim), embeddings (classes, dim), labels[i] (frames,; negative where unknown),
    masks[i] (frames,). Returns the loss summed over masked frames, how many they are and how many are
    predicted right.
    """
    embeddings = embeddings.double()
    total, count, correct = 0.0, 0, 0
    for frames, numbers, mask in zip(projected, labels, masks, strict=True):
        for frame, label, masked in zip(frames.double(), numbers.tolist(), mask.tolist(), strict=True):
            if not masked or label < 0:
                continue
            positive = cosine(frame, embeddings[label]) / temperature
            negatives = []
            for number, embedding in enumerate(embeddings):
                duplicate = number == label
                negatives.append(-math.inf if duplicate else cosine(frame, embedding) / temperature)
            total += cross_entropy(positive, negatives)
            correct += positive > max(negatives)
            count += 1
    return total, count, correct


def contrastive_loss(
    projected: Sequence[Tensor],
    targets: Sequence[Tensor],
    codes: Sequence[Tensor],
    masks: Sequence[Tensor],
    distractors: Sequence[Tensor],
    temperature: float,
) -> tuple[float, int, int]:
    """wav2vec 2.0, equation 3: a masked frame's own quantised target among those of other masked frames of
    the utterance.

    projected[i] and targets[i] (frames, dim), codes[i] (frames, groups), masks[i] (frames,), distractors[i]
    (masked, K) as places among the masked frames. A distractor with the positive's codes is at minus
    infinity.
    """
    total, count, correct = 0.0, 0, 0
    for queries, keys, numbers, mask, drawn in zip(
        projected, targets, codes, masks, distractors, strict=True
    ):
        frames = torch.where(mask)[0].tolist()
        for t, others in zip(frames, drawn.tolist(), strict=True):
            query = queries[t].double()
            positive = cosine(query, keys[t].double()) / temperature
            negatives = []
            for other in others:
                u = frames[other]
                same = bool((numbers[u] == numbers[t]).all())
                negatives.append(-math.inf if same else cosine(query, keys[u].double()) / temperature)
            total += cross_entropy(positive, negatives)
            correct += positive > max(negatives)
            count += 1
    return total, count, correct


def diversity(soft: Tensor) -> float:
    """Equation 4 as fairseq computes it: (G V - sum over groups of the perplexity of the mean distribution) /
    (G V)."""
    num_frames, groups, entries = soft.shape
    perplexities = 0.0
    for g in range(groups):
        mean = [float(soft[:, g, v].double().sum()) / num_frames for v in range(entries)]
        perplexities += math.exp(-sum(p * math.log(p + 1e-7) for p in mean))
    return (groups * entries - perplexities) / (groups * entries)
