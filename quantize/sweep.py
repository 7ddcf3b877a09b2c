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

from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.manifest import Manifest, Utterance
from pretrain.objectives.pnmi import JointCounts, phone_metrics
from pretrain.progress import console, progress
from pretrain.store.artefact import read_meta
from quantize.assignment import nearest
from quantize.features import EncoderSource
from quantize.kmeans import kmeans
from quantize.quality import format_measure, text_table, usage_metrics
from quantize.sampling import VISIT, Sample, require_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from quantize.judging import Judge

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
PANELS = (  # of the plot: title, label of the y axis, and the measures by what the legend calls them
    (
        "Phones: higher is better",
        "share, 0 to 1",
        {
            "pnmi": "PNMI",
            "phone_purity": "phone purity",
            "phone_accuracy_features": "phone probe, accuracy",
        },
    ),
    (
        "ABX error: lower is better",
        "error, %",
        {"abx_within_features": "within a speaker", "abx_across_features": "across speakers"},
    ),
    (
        "Speaker probe: lower is better",
        "accuracy, %",
        {"speaker_accuracy": "of an utterance", "speaker_frame_accuracy": "of one frame"},
    ),
)
USE_PANEL = (
    "Units in use",
    "perplexity, units",
    {"perplexity": "perplexity"},
)  # where there are no phones, and little else
PANEL_INCHES = (4.0, 2.8)

Panel = tuple[str, str, dict[str, str]]


def choose_layer(
    manifest: Manifest,
    split: str | None,
    select_split: str | None,
    source: EncoderSource,
    num_classes: int,
    seed: int,
    folder: str | Path | None = None,
) -> dict[str, Any]:
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
        found = sweep_layers(
            rows, judged, source, layers, num_classes, frames=budget, seed=seed, folder=folder
        )
    choice = recommend(layers, found, select_split)
    if not found:
        console.print(f"layer: {choice['chosen_by']}")
    return choice


def recommend(
    layers: Sequence[int], found: Mapping[int, Mapping[str, float]], split: str | None
) -> dict[str, Any]:
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
    return {
        "layer": best,
        "chosen_by": reason,
        "sweep": {str(layer): score for layer, score in scores.items()},
    }


def read_choice(folder: str | Path) -> dict[str, Any]:
    """What a finished sweep recommends: `layer`, `chosen_by`, `sweep` {layer: PNMI}, and the `encoder` fingerprint and `convention`
    of features that it holds for."""
    meta = read_meta(folder, "layer-sweep")
    return {
        **meta["choice"],
        "encoder": meta["parents"]["encoder"],
        "convention": meta["config"]["convention"],
    }


def plan_sweep(
    rows: Manifest, num_classes: int, seed: int, frames: int | None = None
) -> tuple[int, list[Utterance]]:
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
    rows: Manifest,
    judged: Sequence[Utterance],
    source: EncoderSource,
    layers: Sequence[int],
    num_classes: int,
    *,
    frames: int,
    seed: int,
    folder: str | Path | None = None,
    judge: "Judge | None" = None,
) -> dict[int, dict[str, float]]:
    """Measures by layer: a quick k-means of each is fitted on `frames` of `rows`, and judged on the utterances `judged`.

    `usage` and `perplexity`; with phones `pnmi` and `phone_purity`; with a `judge`, whose utterances are among `judged`, ABX and
    the phone probe on its features and the speaker probe on its units.
    """
    sample = Sample(rows, frames, seed)
    points = frame_file(folder, (len(layers), sample.size, source.dim))
    ends = (
        np.cumsum([utterance.num_frames for utterance in judge.utterances])
        if judge
        else np.zeros(1, np.int64)
    )
    places = (
        {u.id: slice(end - u.num_frames, end) for u, end in zip(judge.utterances, ends.tolist(), strict=True)}
        if judge
        else {}
    )
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
        fits = [
            kmeans(np.array(layer), num_classes, seed=seed, max_iterations=SWEEP_ITERATIONS)
            for layer in points
        ]
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
        results[layer] = {
            key: of_phones[key] for key in ("pnmi", "phone_purity") if of_phones
        } | usage_metrics(counts[number])
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
            if hasattr(
                os, "posix_fallocate"
            ):  # so that a full disk is an error here and not a dead process later
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


def layer_panels(summary: Mapping[str, Any]) -> list[Panel]:
    """The panels of `PANELS` that a sweep has numbers for; perplexity beside them where it knows no phones."""
    known = {key for layer in summary["layers"].values() for key in layer}
    found = [
        (title, label, {key: name for key, name in keys.items() if key in known})
        for title, label, keys in PANELS
    ]
    return [panel for panel in found if panel[2]] + ([] if "pnmi" in known else [USE_PANEL])


def draw_panel(axes: "Axes", summary: Mapping[str, Any], panel: Panel) -> None:
    """One panel's measures over the layers, without its title; the recommended layer is marked."""
    from matplotlib.ticker import MaxNLocator

    _, label, keys = panel
    layers: dict[str, dict[str, float]] = summary["layers"]
    scale = 100 if label.endswith("%") else 1
    for key, name in keys.items():
        points = [
            (int(layer), scale * measures[key]) for layer, measures in layers.items() if key in measures
        ]
        axes.plot(*np.transpose(points), "o-", linewidth=1.6, markersize=3.5, label=name)
    axes.axvline(
        summary["layer"], color="#555", linewidth=1, linestyle="--", label=f"layer {summary['layer']}, chosen"
    )
    axes.set(xlabel="layer (0: the input of the first)" if "0" in layers else "layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def draw_layers(summary: Mapping[str, Any]) -> "Figure":
    """The measures over the layers, all panels side by side and each of one size."""
    from matplotlib.figure import Figure

    panels = layer_panels(summary)
    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, summary, panel)
        axes.set_title(panel[0], fontsize=9, loc="left", fontweight="bold")
    return figure
