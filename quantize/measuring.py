"""The verb `measure`: how good units are, or which layer of an encoder makes the best ones.

With `labels`: everything that counts over frames tells, on all utterances of a split; ABX and probes of the units, on a seeded
draw of them. With the `codebook` that the labels come from (and the `encoder` it belongs to) the features before quantisation,
too, and what quantising costs. With `layers` and an `encoder`: the sweep of quantize/sweep.py.

Silence and frames without a phone count as phones of their own, as in the HuBERT paper; PNMI without them stands beside.
Purities cannot be compared across different numbers of classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.labels import MAX_CLASSES, Labels
from pretrain.data.manifest import Manifest, Utterance
from pretrain.objectives.pnmi import JointCounts, phone_metrics
from pretrain.progress import progress
from pretrain.store.artefact import atomic_path, commit, require_absent, write_json
from quantize.abx import Context
from quantize.codebook import Codebook
from quantize.encoding import EncodeConfig, open_source
from quantize.features import FeatureSource, LayerConvention, open_encoder_source
from quantize.judging import Judge
from quantize.quality import (
    deduplicated,
    level_metrics,
    matching_levels,
    measures_text,
    rate_metrics,
    usage_metrics,
)
from quantize.sampling import Sample, require_finite
from quantize.sweep import (
    SWEEP_FRAMES,
    draw_layers,
    draw_utterances,
    frame_file,
    layer_text,
    plan_sweep,
    recommend,
    sweep_layers,
)

JUDGED_FRAMES = 200_000  # 67 minutes: with a codebook of 768 dimensions, 1.2 GB of disk for the features and centroids meanwhile


class MeasureConfig(Config):
    """Either `labels` or `layers`. `silence`: phones that are no tokens of ABX and are left out of `pnmi_speech`; "" is no phone."""

    manifest: PathStr
    out: PathStr
    split: Split = None
    labels: PathStr | None = Field(None, description="units to measure")
    codebook: PathStr | None = Field(None, description="that of the labels: measures the features, too")
    encoder: PathStr | None = Field(
        None, description="run folder or fairseq2:CARD: the codebook's, or the one whose layers are measured"
    )
    layers: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="layers to compare; 0 is the first layer's input"
    )
    silence: list[str] = Field(["", "_", "sil", "SIL", "sp", "spn", "pau", "h#"])
    abx: bool = True
    abx_context: Context = "triphone"
    abx_distance: Literal["angular", "cosine"] = Field(
        "angular", description="of features; units are the same or not"
    )
    probes: bool = Field(
        True, description="how well phone and speaker are told, by a linear classifier on other utterances"
    )
    frames: int | None = Field(
        None,
        ge=1,
        description="about so many, of whole utterances drawn by the seed, for ABX, probes and features; 200,000, of layers 20,000",
    )
    seed: Seed = 0
    num_classes: int = Field(100, ge=1, le=MAX_CLASSES, description="of each layer's k-means")
    fit_split: Split = Field(
        None, description="where the layers' k-means is fitted; without, on what is judged"
    )
    convention: LayerConvention = Field(
        "residual", description="a layer's features: its output, or its feed-forward's"
    )
    device: str = "auto"
    batch_seconds: float | None = Field(
        None, ge=0, description="audio per batch on a GPU; a CPU takes utterances one by one"
    )
    workers: int = Field(2, ge=1, description="threads that decode")

    @model_validator(mode="after")
    def _labels_or_layers(self) -> "MeasureConfig":
        if (self.labels is None) == (self.layers is None):
            raise ValueError(
                "give either `labels`, to measure units, or `layers`, to compare an encoder's layers"
            )
        if self.layers is not None and (self.encoder is None or self.codebook is not None):
            raise ValueError("`layers` needs `encoder` and no `codebook`")
        if self.layers is None and self.encoder is not None and self.codebook is None:
            raise ValueError("`encoder` needs the `codebook` that the labels come from, or `layers`")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        if self.labels is not None and (
            foreign := [
                name
                for name in ("num_classes", "fit_split", "convention")
                if getattr(self, name) != defaults[name]
            ]
        ):
            raise ValueError(f"{', '.join(foreign)}: a matter of `layers`; the labels have theirs")
        return self


def require_frames(config: MeasureConfig) -> None:
    """ValueError where a split is missing, or has fewer frames than the layers' k-means has classes; reads the manifest alone."""
    manifest = Manifest(config.manifest)
    rows = manifest.select(config.split)
    if config.layers is not None:
        fit_rows = rows if config.fit_split is None else manifest.select(config.fit_split)
        budget, _ = plan_sweep(rows, config.num_classes, config.seed, config.frames)
        if (size := Sample(fit_rows, budget, config.seed).size) < config.num_classes:
            raise ValueError(
                f"{manifest.folder}: num_classes: {config.num_classes} classes cannot be fitted on the {size} frames of fit_split = "
                f"{config.fit_split!r}; take fewer classes"
            )


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measure one split; the summary is what summary.json holds (docs/formats.md).

    A `codebook` that is not the labels', or an encoder that is not the codebook's, is a ValueError naming both.
    """
    require_absent(config.out)
    return measure_units(config) if config.layers is None else measure_layers(config)


def measure_units(config: MeasureConfig) -> dict[str, Any]:
    """Quality of labels: writes summary.json, joint.npy (phones, classes) int64 of level 0, and phones.json.

    What phones or speakers are needed for and missing is left out; `notes` in the summary says why. Without phone alignments
    `joint.npy` has no rows. An utterance whose labels differ by more than one frame from its audio is a ValueError.
    """
    assert config.labels is not None
    manifest, labels, out = Manifest(config.manifest), Labels(config.labels), Path(config.out)
    rows = manifest.select(config.split)
    codebook = open_codebook(config, labels)
    source = open_source(_encode_config(config, codebook), codebook) if codebook else None
    num_levels, num_classes = labels.num_levels, labels.num_classes
    counts, joint_counts = np.zeros((2, num_levels, num_classes), dtype=np.int64)
    unit_counts = np.zeros(num_classes, dtype=np.int64)
    joint = JointCounts(num_classes)
    with progress("measure", total=len(rows), unit="utterance") as advance:
        for utterance in rows:
            frames = matching_levels(utterance, labels)  # (frames, levels)
            counts += by_level(frames, num_classes)
            unit_counts += np.bincount(deduplicated(frames[:, 0]), minlength=num_classes)
            if num_levels > 1:
                joint_counts += by_level(deduplicated(frames), num_classes)
            if utterance.phones is not None:
                joint.add(utterance, frames[:, 0])
            advance(1)
    phones, matrix = joint.matrix()
    summary: dict[str, Any] = {
        "utterances": len(rows),
        "frames": int(counts[0].sum()),
        "num_classes": num_classes,
        "num_levels": num_levels,
        **usage_metrics(counts[0]),
        **rate_metrics(counts[0], unit_counts, labels.frame_rate_hz, num_levels),
        **(level_metrics(counts, joint_counts, labels.frame_rate_hz) if num_levels > 1 else {}),
    }
    notes: list[str] = []
    if matrix.any():
        silent = np.isin(phones, config.silence)
        summary |= {
            "frames_with_phones": int(matrix.sum()),
            "num_phones": len(phones),
            **phone_metrics(matrix),
            "silence_share": float(matrix[silent].sum() / matrix.sum()),
        }
        if matrix[~silent].any():
            summary["pnmi_speech"] = phone_metrics(matrix[~silent])["pnmi"]
        else:
            notes.append("no PNMI without silence: every phone is one of `silence`")
    if config.abx or config.probes or source is not None:
        judged, more_notes = judge_units(config, rows, labels, codebook, source)
        summary, notes = summary | judged, notes + more_notes
    summary |= {"notes": notes} if notes else {}
    write_json(out / "summary.json", summary)
    write_json(out / "phones.json", phones)
    with atomic_path(out / "joint.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, matrix)
    parents = {"manifest": manifest.fingerprint, "labels": labels.fingerprint, "codebook": labels.codebook}
    if codebook is not None and codebook.source["kind"] == "encoder":
        parents["encoder"] = codebook.source["encoder"]
    commit(out, "measurement", config.resolved(), parents, ["summary.json", "joint.npy", "phones.json"])
    return summary


def by_level(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of labels (frames, levels), (levels, K)."""
    return np.stack([np.bincount(level, minlength=num_classes) for level in labels.T])


def judge_units(
    config: MeasureConfig,
    rows: Manifest,
    labels: Labels,
    codebook: Codebook | None,
    source: FeatureSource | None,
) -> tuple[dict[str, Any], list[str]]:
    """ABX and probes of the units of drawn utterances, and of their features where there is a source; notes on what is missing."""
    utterances = draw_utterances(rows, config.frames or JUDGED_FRAMES, config.seed)
    judge = Judge(
        utterances,
        use_abx=config.abx,
        context=config.abx_context,
        distance=config.abx_distance,
        use_probes=config.probes,
        silence=config.silence,
        seed=config.seed,
    )
    units = {utterance.id: matching_levels(utterance, labels) for utterance in utterances}
    found: dict[str, Any] = {
        "judged_utterances": len(utterances),
        "judged_frames": sum(map(len, units.values())),
    }
    found |= judge.of_units({name: levels[:, 0] for name, levels in units.items()}, labels.num_classes)
    if codebook is not None and source is not None:
        found |= judge_features(config, judge, utterances, units, codebook, source)
    return found, judge.notes


def judge_features(
    config: MeasureConfig,
    judge: Judge,
    utterances: Sequence[Utterance],
    units: dict[str, np.ndarray],
    codebook: Codebook,
    source: FeatureSource,
) -> dict[str, Any]:
    """ABX and probes of the features and ABX of the centroids that stand for them; what quantising loses at each level.

    `quantisation_error` is the mean squared distance of a frame to its centroids' sum over the variance of the frames, 1 being
    what the frames' mean alone would give. Spherical centroids are directions: there is no distance to them that could be compared.
    """
    spherical = bool(codebook.meta["config"].get("spherical"))
    total = sum(utterance.num_frames for utterance in utterances)
    stored = frame_file(config.out, (2, total, codebook.dim))
    features, centroids = dict[str, np.ndarray](), dict[str, np.ndarray]()
    errors, squares, sums, done = np.zeros(codebook.num_levels), 0.0, np.zeros(codebook.dim), 0
    with progress("features", total=sum(u.length for u in utterances) / SAMPLE_RATE, unit="s") as advance:
        for utterance, found in source.features(utterances):
            require_finite(utterance, found)
            levels = units[utterance.id]
            used = slice(done, done + min(len(found), len(levels)))  # labels may be one frame short
            found, levels = found[: used.stop - used.start], levels[: used.stop - used.start]
            stored[0, used], stored[1, used] = found, codebook.decode(levels)
            features[utterance.id], centroids[utterance.id] = stored[0, used], stored[1, used]
            done = used.stop
            advance(utterance.length / SAMPLE_RATE)
            if spherical:
                continue
            residual = found.astype(np.float64) - codebook.mean
            squares, sums = squares + np.square(residual).sum(), sums + residual.sum(axis=0)
            for level, centroid in enumerate(codebook.centroids):
                residual -= centroid[levels[:, level]]
                errors[level] += np.square(residual).sum()
    scores: dict[str, Any] = {}
    if spherical:
        judge.notes.append(
            "no quantisation error: the codebook is spherical, and its centroids are directions"
        )
    else:
        variance = squares - np.square(sums).sum() / max(1, done)
        relative = [float(error / variance) if variance > 0 else 0.0 for error in errors]
        scores = {"quantisation_error": relative[-1]}
        scores |= {"quantisation_error_by_level": relative} if len(relative) > 1 else {}
    return scores | judge.abx(centroids, config.abx_distance, "_centroids") | judge.of_features(features)


def open_codebook(config: MeasureConfig, labels: Labels) -> Codebook | None:
    """The codebook that the labels are of, where the config names one; another is a ValueError."""
    if config.codebook is None:
        return None
    codebook = Codebook.open(config.codebook)
    if codebook.fingerprint != labels.codebook:
        raise ValueError(
            f"codebook: {config.labels} are labels of codebook {labels.codebook}, and {config.codebook} is {codebook.fingerprint}; "
            "give the one they were encoded with"
        )
    return codebook


def _encode_config(config: MeasureConfig, codebook: Codebook) -> EncodeConfig:
    """How `encode` would be told to make these labels: it knows which source a codebook needs."""
    return EncodeConfig(
        manifest=config.manifest,
        codebook=str(codebook.folder),
        out=config.out,
        encoder=config.encoder,
        device=config.device,
        batch_seconds=config.batch_seconds,
        workers=config.workers,
    )


def measure_layers(config: MeasureConfig) -> dict[str, Any]:
    """Compare layers: writes summary.json (`layers` {layer: measures}, `layer`, `chosen_by`) and layers.svg."""
    import matplotlib

    assert config.encoder is not None and config.layers is not None
    manifest, out = Manifest(config.manifest), Path(config.out)
    rows = manifest.select(config.split)
    fit_rows = rows if config.fit_split is None else manifest.select(config.fit_split)
    source = open_encoder_source(
        config.encoder,
        0,
        device=config.device,
        batch_seconds=config.batch_seconds,
        workers=config.workers,
        convention=config.convention,
    )
    num_layers = source.encoder.config.num_layers
    layers = list(range(num_layers + 1)) if config.layers == "all" else sorted(set(config.layers))
    if layers[-1] > num_layers:
        raise ValueError(
            f"layers: {layers[-1]} does not exist; {config.encoder} has layers 0 to {num_layers}"
        )
    budget, judged = plan_sweep(rows, config.num_classes, config.seed, config.frames)
    names = {utterance.id for utterance in judged}
    drawn = [
        utterance
        for utterance in draw_utterances(rows, config.frames or SWEEP_FRAMES, config.seed)
        if utterance.id in names
    ]
    judge = Judge(
        drawn,
        use_abx=config.abx,
        context=config.abx_context,
        distance=config.abx_distance,
        use_probes=config.probes,
        silence=config.silence,
        seed=config.seed,
        brief=True,
    )
    found = sweep_layers(
        fit_rows,
        judged,
        source,
        layers,
        config.num_classes,
        frames=budget,
        seed=config.seed,
        folder=out,
        judge=judge,
    )
    choice = recommend(layers, found, config.split)
    summary: dict[str, Any] = {
        "utterances": len(judged),
        "frames": sum(utterance.num_frames for utterance in judged),
        "judged_utterances": len(drawn),
        "judged_frames": sum(utterance.num_frames for utterance in drawn),
        "num_classes": config.num_classes,
        "layers": {str(layer): measures for layer, measures in found.items()},
        "layer": choice["layer"],
        "chosen_by": choice["chosen_by"],
    }
    summary |= {"notes": judge.notes} if judge.notes else {}
    write_json(out / "summary.json", summary)
    with matplotlib.rc_context({"svg.hashsalt": "wordless"}), atomic_path(out / "layers.svg") as temporary:
        draw_layers(summary).savefig(temporary, format="svg", metadata={"Date": None})
    parents = {"manifest": manifest.fingerprint, "encoder": source.fingerprint}
    commit(out, "layer-sweep", config.resolved(), parents, ["summary.json", "layers.svg"], choice=choice)
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """The summary as a table for a terminal."""
    return layer_text(summary) if "layers" in summary else measures_text({"": summary})
