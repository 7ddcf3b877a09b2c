"""The verb `encode`: decode, features, nearest centroid, labels, in one pass over the audio and two bytes a frame.

Utterances are cut into shards of like duration, in manifest order. A shard appears when it is complete and is skipped when
the verb runs again, so an interrupted run loses at most one shard; `plan.json` beside the shards keeps a run from going on
with another run's inputs.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pretrain.artefact import keep_to_plan, require_absent
from pretrain.audio import SAMPLE_RATE
from pretrain.config import Config
from pretrain.labels import Labels, commit_labels, shard_stands, write_shard
from pretrain.manifest import Manifest
from pretrain.progress import progress
from quantize.codebook import Codebook
from quantize.features import FeatureSource, MfccSource, Precision, open_encoder_source
from quantize.quality import usage_metrics

AGREEMENT_UTTERANCES = 50


class EncodeConfig(Config):
    """`encoder`: the run folder whose features the codebook was fitted on, when they are an encoder's."""

    manifest: str
    codebook: str
    out: str
    split: str | None = None
    encoder: str | None = None
    num_shards: int = Field(8, ge=1, description="at most; never more than utterances")
    device: str = "auto"
    batch_seconds: float | None = Field(None, ge=0, description="audio per batch; 0 is one utterance at a time")
    precision: Precision = Field(
        "float32", description="of the encoder's matrix products; with another, the summary has the label agreement with float32"
    )
    workers: int = Field(2, ge=1, description="threads that decode")


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Write the labels of a split (None: of every row). Returns counts, speed and how the classes are used."""
    require_absent(config.out)
    began = time.monotonic()
    out, manifest = Path(config.out), Manifest(config.manifest)
    rows, codebook = manifest.select(config.split), Codebook.open(config.codebook)
    source = open_source(config, codebook)
    shards = plan_shards(rows.lengths, config.num_shards)
    keep_to_plan(out, {
        "manifest": manifest.fingerprint, "split": config.split, "codebook": codebook.fingerprint, "num_shards": len(shards),
        "precision": config.precision,
    })  # fmt: skip
    lengths = rows.lengths / SAMPLE_RATE
    left = [shard for shard in range(len(shards)) if not shard_stands(out, shard)]
    seconds_left = float(sum(lengths[shards[shard]].sum() for shard in left))
    with progress("encode", total=float(lengths.sum()), unit="s", done=float(lengths.sum()) - seconds_left) as advance:
        for shard in left:
            utterances = [rows[int(row)] for row in shards[shard]]
            found: dict[str, np.ndarray] = {}
            for utterance, features in source.features(utterances):
                assert len(features) == utterance.num_frames, utterance.id
                try:
                    found[utterance.id] = codebook.assign(features)
                except ValueError as error:
                    raise ValueError(f"{utterance.path} (utterance {utterance.id!r}): {error}") from None
                advance(utterance.length / SAMPLE_RATE)
            write_shard(out, shard, [utterance.id for utterance in utterances], [found[utterance.id] for utterance in utterances])
    seconds = time.monotonic() - began
    parents = {"manifest": manifest.fingerprint, "codebook": codebook.fingerprint}
    if codebook.source["kind"] == "encoder":
        parents["encoder"] = codebook.source["encoder"]
    commit_labels(
        out, len(shards), config.resolved(), parents, codebook=codebook.fingerprint, num_classes=codebook.num_classes,
        num_levels=codebook.num_levels, expected_ids=rows.column("id"),
    )  # fmt: skip
    (out / "plan.json").unlink()
    counts = count_classes(Labels(out))
    return {
        "utterances": len(rows),
        "hours": float(lengths.sum() / 3600),
        "num_classes": codebook.num_classes,
        "num_shards": len(shards),
        "shards_already_done": len(shards) - len(left),
        "audio_seconds_per_second": seconds_left / seconds,
        "seconds": seconds,
        **usage_metrics(counts),
        **label_agreement(config, codebook, rows, Labels(out)),
    }


def label_agreement(config: EncodeConfig, codebook: Codebook, rows: Manifest, labels: Labels) -> dict[str, float]:
    """With a precision other than float32: the share of frames, of a seeded draw of utterances, with the label of float32."""
    if config.precision == "float32" or config.encoder is None:
        return {}
    chosen = np.random.default_rng(0).permutation(len(rows))[:AGREEMENT_UTTERANCES]
    exact = open_source(config.model_copy(update={"precision": "float32"}), codebook)
    same = [labels[row.id] == codebook.assign(features) for row, features in exact.features([rows[int(i)] for i in chosen])]
    return {"label_agreement": float(np.concatenate(same).mean())}


def open_source(config: EncodeConfig, codebook: Codebook) -> FeatureSource:
    """The source of the features that the codebook quantises; an encoder other than its own is a ValueError naming both."""
    wanted = codebook.source
    if wanted["kind"] == "mfcc":
        if config.encoder is not None:
            raise ValueError(f"encoder: {config.codebook} quantises MFCC; remove encoder = {config.encoder!r}")
        if config.precision != "float32":
            raise ValueError(f"precision: {config.codebook} quantises MFCC; remove precision = {config.precision!r}")
        return MfccSource(wanted["cmvn"], config.workers)
    if config.encoder is None:
        raise ValueError(
            f"encoder: {config.codebook} quantises layer {wanted['layer']} of encoder {wanted['encoder']}; give its run folder"
        )
    source = open_encoder_source(
        config.encoder, wanted["layer"], device=config.device, batch_seconds=config.batch_seconds, workers=config.workers,
        precision=config.precision, convention=wanted.get("convention", "residual"),
    )  # fmt: skip
    if source.fingerprint != wanted["encoder"]:
        raise ValueError(
            f"encoder: {config.codebook} was fitted on encoder {wanted['encoder']}, and {config.encoder} is encoder "
            f"{source.fingerprint}; give the run it was fitted on, or fit a codebook on this one"
        )
    return source


def plan_shards(lengths: np.ndarray, num_shards: int) -> list[np.ndarray]:
    """Rows of each shard: consecutive rows of about the same total length; at most `num_shards`, none of them empty."""
    middles = np.cumsum(lengths) - lengths / 2
    shard = np.floor(middles / lengths.sum() * num_shards)
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(shard)) + 1)


def count_classes(labels: Labels) -> np.ndarray:
    """Frames by class of level 0, (K,) int64."""
    counts = np.zeros(labels.num_classes, dtype=np.int64)
    for utterance in labels.ids:
        counts += np.bincount(labels[utterance].reshape(labels.num_frames(utterance), -1)[:, 0], minlength=labels.num_classes)
    return counts
