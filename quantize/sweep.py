"""Which layer to cluster: the units and features of every layer, judged on the same frames in one pass over
the audio.

Memory holds the frames of one layer. Those of all layers, (layers, frames, dim) float32, are in a file
without a name, which the system removes when the work ends: 2 GB for 20,000 frames of LARGE with 24 layers,
and as much again for ABX and probes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE, Utterance
from pretrain.objectives.pnmi import JointCounts, phone_metrics
from pretrain.progress import console, progress
from pretrain.store.artefact import read_meta
from quantize.assignment import nearest
from quantize.features import EncoderSource
from quantize.judging import Judge
from quantize.kmeans import kmeans
from quantize.quality import format_measure, text_table, usage_metrics
from quantize.subsample import VISIT, Sample, frame_file, require_finite

SWEEP_FRAMES = 20_000  # frames per layer to fit on; whole utterances with four times as many are judged
SWEEP_ITERATIONS = 20
SHOWN = {  # a layer's measures, by how the table calls them
    "pnmi": "PNMI",
    "phone_purity": "phone purity",
    "usage": "in use",
    "perplexity": "perplexity",
    "phone_accuracy_features": "phone probe",
    "abx_within_features": "ABX within",
    "abx_across_features": "ABX across",
    "speaker_frame_accuracy": "speaker by unit",
    "speaker_accuracy": "by utterance",
}


def choose_layer(
    manifest: Manifest,
    split: str | None,
    select_split: str | None,
    source: EncoderSource,
    num_classes: int,
    seed: int,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer whose quick k-means on `split` has the
    highest PNMI.

    One pass over a sample of `split` and one over the select split give all layers. Frames are in an unnamed
    file in `folder` meanwhile (None: the system's temporary folder). Without phone alignments it is the layer
    in the middle.
    """
    rows = manifest.select(split)
    judge = manifest.select(select_split) if manifest.has_phones else None
    layers = list(range(source.encoder.config.num_layers + 1))
    found: dict[int, dict[str, float]] = {}
    if judge is not None and judge.has_phones:
        budget, judged = plan_sweep(judge, num_classes, seed)
        options: dict[str, Any] = {"frames": budget, "seed": seed, "folder": folder}
        found = sweep_layers(rows, judged, source, layers, num_classes, **options)
    choice = recommend(layers, found, select_split)
    if not found:
        console.print(f"layer: {choice['chosen_by']}")
    return choice


def recommend(
    layers: Sequence[int], found: Mapping[int, Mapping[str, float]], split: str | None
) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer with the highest PNMI, or the middle one
    without phones.

    The middle is the choice of HuBERT's first iteration (6 of 12). Layer 0 is chosen only if it is the only
    one.
    """
    candidates = sorted(layer for layer in layers if layer > 0) or list(layers)
    scores = {layer: found[layer]["pnmi"] for layer in layers if "pnmi" in found.get(layer, {})}
    if scores:
        where = f"on {split!r}" if split is not None else "on the whole corpus"
        best, reason = max(candidates, key=scores.__getitem__), f"highest PNMI {where}"
    else:
        best = candidates[(len(candidates) - 1) // 2]
        reason = f"no phone alignments to judge layers by, so the middle one: {best} of {candidates[-1]}"
    return {
        "layer": best,
        "chosen_by": reason,
        "sweep": {str(layer): score for layer, score in scores.items()},
    }


def read_choice(folder: str | Path) -> dict[str, Any]:
    """The recommendation of a finished sweep: `layer`, `chosen_by`, `sweep` {layer: PNMI}, its `encoder` and
    `convention`."""
    meta = read_meta(folder, "layer-sweep")
    return {
        **meta["choice"],
        "encoder": meta["parents"]["encoder"],
        "convention": meta["config"]["convention"],
    }


def plan_sweep(
    rows: Manifest, num_classes: int, seed: int, frames: int | None = None
) -> tuple[int, list[Utterance]]:
    """The number of frames for each layer's k-means, `frames` (20,000) or 20 a class, and the utterances of
    `rows` to judge by.

    The utterances have about four times as many frames.
    """
    budget = max(frames or SWEEP_FRAMES, 20 * num_classes)
    return budget, draw_utterances(rows, VISIT * budget, seed)


def draw_utterances(rows: Manifest, frames: int, seed: int) -> list[Utterance]:
    """Whole utterances with about so many frames, or all; speakers in like parts; only those with phones if
    any have."""
    if rows.has_phones:
        rows = rows.take(np.flatnonzero(rows.column("phones").is_valid().to_numpy()))
    return Sample(rows, max(1, frames // VISIT), seed).utterances


def sweep_layers(
    rows: Manifest,
    judged: Sequence[Utterance],
    source: EncoderSource,
    layers: Sequence[int],
    num_classes: int,
    *,
    frames: int,
    seed: int,
    folder: str | Path | None = None,
    judge: Judge | None = None,
) -> dict[int, dict[str, float]]:
    """Measures by layer: a quick k-means of each is fitted on `frames` of `rows`, and judged on the
    utterances `judged`.

    `usage` and `perplexity`; with phones `pnmi` and `phone_purity`; with a `judge`, whose utterances are
    among `judged`, ABX and the phone probe on its features and the speaker probe on its units.
    """
    sample, places, end = Sample(rows, frames, seed), dict[str, slice](), 0
    for utterance in judge.utterances if judge else ():
        places[utterance.id] = slice(end, end + utterance.num_frames)
        end += utterance.num_frames
    points = frame_file(folder, (len(layers), sample.size, source.dim))
    kept = frame_file(folder, (len(layers), end, source.dim))
    joints = [JointCounts(num_classes) for _ in layers]
    counts = np.zeros((len(layers), num_classes), np.int64)
    units: list[dict[str, np.ndarray]] = [{} for _ in layers]  # of the judge's utterances
    seconds = sample.seconds + sum(utterance.length for utterance in judged) / SAMPLE_RATE
    with progress("all layers", total=seconds, unit="s") as advance:
        for utterance, found in source.all_layers(sample.utterances, layers):
            place, chosen = sample.draw(utterance)
            for number, features in enumerate(found):
                require_finite(utterance, features)
                points[number, place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
        options: dict[str, Any] = {"seed": seed, "max_iterations": SWEEP_ITERATIONS}
        fits = [kmeans(np.array(layer), num_classes, **options) for layer in points]
        for utterance, found in source.all_layers(judged, layers):
            for number, (fit, features) in enumerate(zip(fits, found, strict=True)):
                labels = nearest(features, fit.centroids[0], fit.mean)
                counts[number] += np.bincount(labels, minlength=num_classes)
                if utterance.phones is not None:
                    joints[number].add(utterance, labels)
                if utterance.id in places:
                    kept[number, places[utterance.id]] = features
                    units[number][utterance.id] = labels
            advance(utterance.length / SAMPLE_RATE)
    results: dict[int, dict[str, float]] = {}
    for number, layer in enumerate(layers):
        results[layer] = _of_phones(joints[number]) | usage_metrics(counts[number])
        if judge is not None:
            stored = np.array(kept[number])
            results[layer] |= judge.of_features({name: stored[place] for name, place in places.items()})
            results[layer] |= judge.of_units(units[number], num_classes)
    return results


def _of_phones(joint: JointCounts) -> dict[str, float]:
    """PNMI and phone purity, if there are phones."""
    _, matrix = joint.matrix()
    found = phone_metrics(matrix) if matrix.any() else {}
    return {key: found[key] for key in ("pnmi", "phone_purity") if found}


def layer_text(summary: Mapping[str, Any]) -> str:
    """The table of a sweep for a terminal, a row a layer, and which it recommends."""
    layers: dict[str, dict[str, float]] = summary["layers"]
    keys = [key for key in SHOWN if any(key in layer for layer in layers.values())]
    rows = [
        [
            f"{name}{' *' if name == str(summary['layer']) else ''}",
            *(format_measure(key, layer.get(key)) for key in keys),
        ]
        for name, layer in layers.items()
    ]
    table = text_table(["layer", *(SHOWN[key] for key in keys)], rows)
    input_is_better = layers.get("0", {}).get("pnmi", -1) > layers[str(summary["layer"])].get("pnmi", 1)
    aside = "; layer 0, the input of the first, is not chosen" if input_is_better else ""
    return f"{table}\n* layer {summary['layer']}: {summary['chosen_by']}{aside}"
