"""Which layer to cluster: every layer's units and features judged on the same frames, in one pass over the audio of each split.

Memory holds one layer's frames. Those of all layers, (layers, frames, dim) float32, lie in a file without a name, which is gone
when the work ends, however it ends: 2 GB for 20,000 frames of a LARGE encoder with 24 layers, and as much again for ABX and probes.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.artefact import read_meta
from pretrain.audio import SAMPLE_RATE
from pretrain.manifest import Manifest, Utterance
from pretrain.pnmi import JointCounts, phone_metrics
from pretrain.progress import console, progress
from quantize.assignment import nearest
from quantize.features import EncoderSource
from quantize.kmeans import kmeans
from quantize.quality import format_measure, text_table, usage_metrics
from quantize.sampling import VISIT, Sample, require_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from quantize.judging import Judge

SWEEP_FRAMES = 20_000  # frames per layer to fit on; whole utterances with four times as many are judged
SWEEP_ITERATIONS = 20
SHOWN = {  # a layer's measures, by how the table and the plot call them
    "pnmi": "PNMI", "phone_purity": "phone purity", "usage": "in use", "perplexity": "perplexity",
    "phone_accuracy_features": "phone probe", "abx_within_features": "ABX within", "abx_across_features": "ABX across",
    "speaker_frame_accuracy": "speaker by unit", "speaker_accuracy": "by utterance",
}  # fmt: skip
PANELS = (
    ("Phones: higher is better", ("pnmi", "phone_purity", "phone_accuracy_features")),
    ("ABX error: lower is better", ("abx_within_features", "abx_across_features")),
    ("Speaker told: lower is better", ("speaker_accuracy", "speaker_frame_accuracy")),
)


def choose_layer(
    manifest: Manifest, split: str | None, select_split: str | None, source: EncoderSource, num_classes: int, seed: int,
    folder: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer whose quick k-means on `split` suits the phones of the select split.

    All layers come out of one pass over a sample of `split` and one over the select split; frames lie in an unnamed file in
    `folder` meanwhile (None: the system's temporary folder). Without phone alignments it is the layer in the middle.
    """
    rows = manifest.select(split)
    judge = manifest.select(select_split) if manifest.has_phones else None
    layers = list(range(source.encoder.config.num_layers + 1))
    found: dict[int, dict[str, float]] = {}
    if judge is not None and judge.has_phones:
        budget, judged = plan_sweep(judge, num_classes, seed)
        found = sweep_layers(rows, judged, source, layers, num_classes, frames=budget, seed=seed, folder=folder)
    choice = recommend(layers, found, select_split)
    if not found:
        console.print(f"layer: {choice['chosen_by']}")
    return choice


def recommend(layers: Sequence[int], found: Mapping[int, Mapping[str, float]], split: str | None) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer with the highest PNMI, or the middle one where no phones are known.

    The middle is what HuBERT's first iteration takes (6 of 12). Layer 0, the input of the first, is taken only where it is alone.
    """
    candidates = sorted(layer for layer in layers if layer > 0) or list(layers)
    scores = {layer: found[layer]["pnmi"] for layer in layers if "pnmi" in found.get(layer, {})}
    if scores:
        where = f"on {split!r}" if split is not None else "on the whole corpus"
        best, reason = max(candidates, key=scores.__getitem__), f"highest PNMI {where}"
    else:
        best = candidates[(len(candidates) - 1) // 2]
        reason = f"no phone alignments to judge layers by, so the middle one: {best} of {candidates[-1]}"
    return {"layer": best, "chosen_by": reason, "sweep": {str(layer): score for layer, score in scores.items()}}


def read_choice(folder: str | Path) -> dict[str, Any]:
    """What a finished sweep recommends: `layer`, `chosen_by`, `sweep` {layer: PNMI}, and the `encoder` fingerprint and `convention`
    of features that it holds for."""
    meta = read_meta(folder, "layer-sweep")
    return {**meta["choice"], "encoder": meta["parents"]["encoder"], "convention": meta["config"]["convention"]}


def plan_sweep(rows: Manifest, num_classes: int, seed: int, frames: int | None = None) -> tuple[int, list[Utterance]]:
    """How many frames each layer's k-means is fitted on, `frames` (20,000) or 20 a class, and which utterances of `rows` the layers are
    judged on: about four times as many frames."""
    budget = max(frames or SWEEP_FRAMES, 20 * num_classes)
    return budget, draw_utterances(rows, VISIT * budget, seed)


def draw_utterances(rows: Manifest, frames: int, seed: int) -> list[Utterance]:
    """Whole utterances with about so many frames, or all; speakers in like parts; only those with phones if any have."""
    if rows.has_phones:
        rows = rows.take(np.flatnonzero(rows.column("phones").is_valid().to_numpy()))
    return Sample(rows, max(1, frames // VISIT), seed).utterances


def sweep_layers(
    rows: Manifest, judged: Sequence[Utterance], source: EncoderSource, layers: Sequence[int], num_classes: int, *,
    frames: int, seed: int, folder: str | Path | None = None, judge: "Judge | None" = None,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Measures by layer: a quick k-means of each is fitted on `frames` of `rows`, and judged on the utterances `judged`.

    `usage` and `perplexity`; with phones `pnmi` and `phone_purity`; with a `judge`, whose utterances are among `judged`, ABX and
    the phone probe on its features and the speaker probe on its units.
    """
    sample = Sample(rows, frames, seed)
    points = frame_file(folder, (len(layers), sample.size, source.dim))
    ends = np.cumsum([utterance.num_frames for utterance in judge.utterances]) if judge else np.zeros(1, np.int64)
    places = {u.id: slice(end - u.num_frames, end) for u, end in zip(judge.utterances, ends.tolist(), strict=True)} if judge else {}
    kept = frame_file(folder, (len(layers), int(ends[-1]), source.dim))
    seconds = sample.seconds + sum(utterance.length for utterance in judged) / SAMPLE_RATE
    joints = [JointCounts(num_classes) for _ in layers]
    counts = np.zeros((len(layers), num_classes), np.int64)
    units: list[dict[str, np.ndarray]] = [{} for _ in layers]  # of the judge's utterances
    with progress("all layers", total=seconds, unit="s") as advance:
        for utterance, found in source.all_layers(sample.utterances, layers):
            place, chosen = sample.draw(utterance)
            for number, features in enumerate(found):
                require_finite(utterance, features)
                points[number, place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
        fits = [kmeans(np.array(layer), num_classes, seed=seed, max_iterations=SWEEP_ITERATIONS) for layer in points]
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
    results = {}
    for number, layer in enumerate(layers):
        of_phones = phone_metrics(joint) if (joint := joints[number].matrix()[1]).any() else {}
        results[layer] = {key: of_phones[key] for key in ("pnmi", "phone_purity") if of_phones} | usage_metrics(counts[number])
        if judge is not None:
            frames_of = np.array(kept[number])
            views = {name: frames_of[place] for name, place in places.items()}
            results[layer] |= judge.of_features(views) | judge.of_units(units[number], num_classes)
    return results


def frame_file(folder: str | Path | None, shape: tuple[int, int, int]) -> np.ndarray:
    """A float32 array in a file that has no name and so is left behind by nobody. Too little space is a ValueError that says how much."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    if 0 in shape:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        size = 4 * int(np.prod(shape, dtype=np.int64))
        try:
            if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here and not a dead process later
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise ValueError(
                f"{where}: the features need {size:,} bytes of disk for a while ({error.strerror}); lower `frames`"
            ) from None
        return np.memmap(file, np.float32, "r+", shape=shape)


def layer_text(summary: Mapping[str, Any]) -> str:
    """The table of a sweep for a terminal, a row a layer, and which it recommends."""
    layers: dict[str, dict[str, float]] = summary["layers"]
    keys = [key for key in SHOWN if any(key in layer for layer in layers.values())]
    rows = [
        [f"{name}{' *' if name == str(summary['layer']) else ''}", *(format_measure(key, layer.get(key)) for key in keys)]
        for name, layer in layers.items()
    ]
    table = text_table(["layer", *(SHOWN[key] for key in keys)], rows)
    input_is_better = layers.get("0", {}).get("pnmi", -1) > layers[str(summary["layer"])].get("pnmi", 1)
    aside = "; layer 0, the input of the first, is not chosen" if input_is_better else ""
    return f"{table}\n* layer {summary['layer']}: {summary['chosen_by']}{aside}"


def draw_layers(summary: Mapping[str, Any]) -> "Figure":
    """The measures over the layers; the recommended layer is marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers: dict[str, dict[str, float]] = summary["layers"]
    known = {key for layer in layers.values() for key in layer}
    panels = [(title, [key for key in keys if key in known]) for title, keys in PANELS if known & set(keys)]
    panels = panels or [("Perplexity of units", ["perplexity"])]
    figure = Figure(figsize=(3.6 * len(panels), 2.9), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in keys:
            points = [(int(layer), measures[key]) for layer, measures in layers.items() if key in measures]
            axes.plot(*np.transpose(points), "o-", linewidth=1.6, markersize=3.5, label=SHOWN[key])
        axes.axvline(summary["layer"], color="#555", linewidth=1, linestyle="--", label=f"layer {summary['layer']}")
        axes.set(xlabel="layer")
        axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ddd", linewidth=0.6)
        axes.legend(fontsize=8, frameon=False)
    return figure
