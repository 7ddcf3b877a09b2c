"""The verb `measure`: how good units are, or which layer of an encoder makes the best ones.

With `labels`: measures that count over frames, on all utterances of a split; ABX and probes of the units, on
a seeded draw of utterances. With the `codebook` of the labels (and its `encoder`): also ABX and probes of the
features before quantisation, and the loss by quantising. With `layers` and an `encoder`: the sweep of
quantize/sweep.py.

Silence and frames without a phone count as phones of their own, as in the HuBERT paper; `pnmi_speech` is
without them. Purities cannot be compared across different numbers of classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import PathStr, Seed, Split
from pretrain.data.label_shards import MAX_CLASSES
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Utterance
from pretrain.model.config import LayerConvention
from pretrain.objectives.pnmi import JointCounts, phone_metrics
from pretrain.progress import progress
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path, write_json
from quantize.codebook import Codebook
from quantize.extraction import Extraction, open_encoder, open_source
from quantize.judging import Judge, judge_features
from quantize.layer_figure import draw_layers
from quantize.phone_tokens import Context
from quantize.quality import (
    deduplicated,
    level_metrics,
    matching_levels,
    measures_text,
    rate_metrics,
    usage_metrics,
)
from quantize.subsample import Sample
from quantize.sweep import (
    SWEEP_FRAMES,
    draw_utterances,
    layer_text,
    plan_sweep,
    recommend,
    sweep_layers,
)

JUDGED_FRAMES = 200_000  # 67 minutes; of 768 dimensions, features and centroids take 1.2 GB of disk meanwhile


class MeasureConfig(Extraction):
    """Either `labels` or `layers`. `silence`: phones that are no tokens of ABX and are left out of
    `pnmi_speech`; "" is no phone."""

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
        True, description="linear classifiers of phone and speaker, tested on other utterances"
    )
    frames: int | None = Field(
        None,
        ge=1,
        description="for ABX, probes and features: about so many, of whole utterances drawn by the seed; "
        "200,000 by default, of layers 20,000",
    )
    seed: Seed = 0
    num_classes: int = Field(100, ge=1, le=MAX_CLASSES, description="of each layer's k-means")
    fit_split: Split = Field(
        None, description="where the layers' k-means is fitted; without, on what is judged"
    )
    convention: LayerConvention = Field(
        "residual", description="a layer's features: its output, or its feed-forward's"
    )

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
        fields, of_layers = type(self).model_fields, ("num_classes", "fit_split", "convention")
        foreign = [name for name in of_layers if getattr(self, name) != fields[name].default]
        if self.labels is not None and foreign:
            raise ValueError(f"{', '.join(foreign)}: a matter of `layers`; the labels have theirs")
        return self

    def judge(self, utterances: Sequence[Utterance], brief: bool = False) -> Judge:
        """ABX and probes of these utterances, as configured."""
        return Judge(
            utterances,
            use_abx=self.abx,
            context=self.abx_context,
            distance=self.abx_distance,
            use_probes=self.probes,
            silence=self.silence,
            seed=self.seed,
            brief=brief,
        )


def require_frames(config: MeasureConfig) -> None:
    """Raises ValueError if a split is missing, or has fewer frames than the layers' k-means has classes.

    Reads the manifest only.
    """
    manifest = Manifest(config.manifest)
    rows = manifest.select(config.split)
    if config.layers is not None:
        fit_rows = rows if config.fit_split is None else manifest.select(config.fit_split)
        budget, _ = plan_sweep(rows, config.num_classes, config.seed, config.frames)
        if (size := Sample(fit_rows, budget, config.seed).size) < config.num_classes:
            raise ValueError(
                f"{manifest.folder}: num_classes: {config.num_classes} classes cannot be fitted on the "
                f"{size} frames of fit_split = {config.fit_split!r}; take fewer classes"
            )


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measures one split; returns the content of summary.json (docs/formats.md).

    Raises ValueError if the `codebook` is not that of the labels, or the encoder not that of the codebook.
    """
    require_absent(config.out)
    return measure_units(config) if config.layers is None else measure_layers(config)


def measure_units(config: MeasureConfig) -> dict[str, Any]:
    """Quality of labels: writes summary.json, joint.npy (phones, classes) int64 of level 0, and phones.json.

    Measures whose phones or speakers are missing are left out; `notes` in the summary has the reasons.
    Without phone alignments `joint.npy` has no rows. Raises ValueError if labels and audio differ by more
    than one frame.
    """
    assert config.labels is not None
    manifest, labels, out = Manifest(config.manifest), Labels(config.labels), Path(config.out)
    rows = manifest.select(config.split)
    codebook = open_codebook(config, labels)
    source = open_source(codebook, config.encoder, config) if codebook else None
    summary, joint = count_labels(rows, labels)
    phones, matrix = joint.matrix()
    of_phones, notes = measure_phones(phones, matrix, config.silence)
    summary |= of_phones
    if config.abx or config.probes or source is not None:
        utterances = draw_utterances(rows, config.frames or JUDGED_FRAMES, config.seed)
        judge = config.judge(utterances)
        units = {utterance.id: matching_levels(utterance, labels) for utterance in utterances}
        summary |= {"judged_utterances": len(utterances), "judged_frames": sum(map(len, units.values()))}
        summary |= judge.of_units({name: levels[:, 0] for name, levels in units.items()}, labels.num_classes)
        if codebook is not None and source is not None:
            summary |= judge_features(judge, units, codebook, source, out)
        notes += judge.notes
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


def count_labels(rows: Manifest, labels: Labels) -> tuple[dict[str, Any], JointCounts]:
    """Use and rates of the labels of all `rows`, and the joint counts of phones and level-0 labels."""
    num_levels, num_classes, rate = labels.num_levels, labels.num_classes, labels.frame_rate_hz
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
    summary: dict[str, Any] = {
        "utterances": len(rows),
        "frames": int(counts[0].sum()),
        "num_classes": num_classes,
        "num_levels": num_levels,
        **usage_metrics(counts[0]),
        **rate_metrics(counts[0], unit_counts, rate, num_levels),
        **(level_metrics(counts, joint_counts, rate) if num_levels > 1 else {}),
    }
    return summary, joint


def measure_phones(
    phones: list[str], matrix: np.ndarray, silence: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """PNMI and purities of joint counts (phones, classes), with and without `silence`, and notes."""
    if not matrix.any():
        return {}, []
    silent = np.isin(phones, silence)
    found: dict[str, Any] = {
        "frames_with_phones": int(matrix.sum()),
        "num_phones": len(phones),
        **phone_metrics(matrix),
        "silence_share": float(matrix[silent].sum() / matrix.sum()),
    }
    if not matrix[~silent].any():
        return found, ["no PNMI without silence: every phone is one of `silence`"]
    return found | {"pnmi_speech": phone_metrics(matrix[~silent])["pnmi"]}, []


def by_level(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of labels (frames, levels), (levels, K)."""
    return np.stack([np.bincount(level, minlength=num_classes) for level in labels.T])


def open_codebook(config: MeasureConfig, labels: Labels) -> Codebook | None:
    """The codebook of the config, None without one. Raises ValueError if the labels are of another."""
    if config.codebook is None:
        return None
    codebook = Codebook.open(config.codebook)
    if codebook.fingerprint != labels.codebook:
        raise ValueError(
            f"codebook: {config.labels} are labels of codebook {labels.codebook}, and {config.codebook} is "
            f"{codebook.fingerprint}; give the one they were encoded with"
        )
    return codebook


def measure_layers(config: MeasureConfig) -> dict[str, Any]:
    """Compare layers: writes summary.json (`layers` {layer: measures}, `layer`, `chosen_by`) and
    layers.svg."""
    import matplotlib

    assert config.encoder is not None and config.layers is not None
    manifest, out = Manifest(config.manifest), Path(config.out)
    rows = manifest.select(config.split)
    fit_rows = rows if config.fit_split is None else manifest.select(config.fit_split)
    source = open_encoder(config.encoder, 0, config, config.convention)
    num_layers = source.encoder.config.num_layers
    layers = list(range(num_layers + 1)) if config.layers == "all" else sorted(set(config.layers))
    if layers[-1] > num_layers:
        raise ValueError(
            f"layers: {layers[-1]} does not exist; {config.encoder} has layers 0 to {num_layers}"
        )
    budget, judged = plan_sweep(rows, config.num_classes, config.seed, config.frames)
    names = {utterance.id for utterance in judged}
    drawn = draw_utterances(rows, config.frames or SWEEP_FRAMES, config.seed)
    judge = config.judge([utterance for utterance in drawn if utterance.id in names], brief=True)
    options: dict[str, Any] = {"frames": budget, "seed": config.seed, "folder": out, "judge": judge}
    found = sweep_layers(fit_rows, judged, source, layers, config.num_classes, **options)
    choice = recommend(layers, found, config.split)
    summary: dict[str, Any] = {
        "utterances": len(judged),
        "frames": sum(utterance.num_frames for utterance in judged),
        "judged_utterances": len(judge.utterances),
        "judged_frames": sum(utterance.num_frames for utterance in judge.utterances),
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
