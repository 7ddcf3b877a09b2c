"""Which layer to cluster: every layer's units judged on the same frames, in one pass over the audio."""

from typing import Any

import numpy as np

from pretrain.audio import SAMPLE_RATE
from pretrain.manifest import Manifest
from pretrain.pnmi import JointCounts, phone_metrics
from pretrain.progress import console, progress
from quantize.features import EncoderSource
from quantize.kmeans import kmeans, nearest
from quantize.sampling import Sample

SWEEP_FRAMES = 20_000  # frames per layer that the sweep fits on, and frames of the select split it scores
SWEEP_ITERATIONS = 20


def choose_layer(
    manifest: Manifest, split: str | None, select_split: str, source: EncoderSource, num_classes: int, seed: int
) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer whose quick k-means on `split` suits the phones of the select split.

    All layers come out of one pass over a sample of `split` and one over the select split. Without phone alignments it is
    the layer in the middle, as in HuBERT's first iteration (6 of 12).
    """
    rows = manifest.select(split)
    num_layers = source.encoder.config.num_layers
    judge = manifest.select(select_split) if manifest.has_phones else None
    if judge is None or not judge.has_phones:
        middle = max(1, num_layers // 2)
        reason = f"no phone alignments to judge layers by, so the middle one: {middle} of {num_layers}"
        console.print(f"layer: {reason}")
        return {"layer": middle, "chosen_by": reason, "sweep": {}}
    budget = max(SWEEP_FRAMES, 20 * num_classes)
    sample, test = Sample(rows, budget, seed), Sample(judge, budget, seed)
    frames = np.empty((num_layers + 1, sample.size, source.dim), dtype=np.float32)
    counts = [JointCounts(num_classes) for _ in frames]
    with progress("all layers", total=sample.seconds + test.seconds, unit="s") as advance:
        for utterance, layers in source.all_layers(sample.utterances):
            place, chosen = sample.draw(utterance)
            for layer, features in enumerate(layers):
                frames[layer, place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
        fits = [kmeans(points, num_classes, seed=seed, max_iterations=SWEEP_ITERATIONS) for points in frames]
        for utterance, layers in source.all_layers([utterance for utterance in test.utterances if utterance.phones is not None]):
            for fit, features, joint in zip(fits, layers, counts, strict=True):
                joint.add(utterance, nearest(features, fit.centroids, fit.mean))
            advance(utterance.length / SAMPLE_RATE)
    scores = [phone_metrics(joint.matrix()[1])["pnmi"] for joint in counts]
    best = max(range(1, num_layers + 1), key=scores.__getitem__)
    sweep = {str(layer): score for layer, score in enumerate(scores)}
    return {"layer": best, "chosen_by": f"highest PNMI on {select_split!r}", "sweep": sweep}
