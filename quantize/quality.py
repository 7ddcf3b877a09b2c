"""How good units are: information shared with phones, purities, usage, bitrates; the verb `measure`.

Everything comes from counts over 50 Hz frames: the joint counts of phone and class where alignments exist, usage and runs
where they do not. Silence and frames without a phone count as phones of their own, as in the HuBERT paper; PNMI without
them stands beside. Purities cannot be compared across different numbers of classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pretrain.artefact import atomic_path, commit, require_absent, write_json
from pretrain.config import Config
from pretrain.labels import Labels
from pretrain.manifest import Manifest, Utterance
from pretrain.pnmi import JointCounts, entropy_bits, phone_metrics
from pretrain.progress import progress


class MeasureConfig(Config):
    """`silence`: the phones left out of `pnmi_speech`; "" is a frame without a phone."""

    manifest: str
    labels: str
    out: str
    split: str | None = None
    silence: list[str] = Field(["", "_", "sil", "SIL", "sp", "spn", "pau", "h#"])


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Quality of one split's labels (level 0): writes summary.json, joint.npy (phones, classes) int64 and phones.json.

    Without phone alignments `joint.npy` has no rows and the summary has no phone metrics. An utterance whose labels differ
    by more than one frame from its audio is a ValueError.
    """
    require_absent(config.out)
    manifest = Manifest(config.manifest)
    rows, labels, out = manifest.select(config.split), Labels(config.labels), Path(config.out)
    counts, unit_counts = np.zeros((2, labels.num_classes), dtype=np.int64)
    joint = JointCounts(labels.num_classes)
    with progress("measure", total=len(rows), unit="utterance") as advance:
        for utterance in rows:
            frames = matching_labels(utterance, labels)
            counts += np.bincount(frames, minlength=labels.num_classes)
            unit_counts += np.bincount(deduplicated(frames), minlength=labels.num_classes)
            if utterance.phones is not None:
                joint.add(utterance, frames)
            advance(1)
    phones, matrix = joint.matrix()
    summary = {
        "utterances": len(rows),
        "frames": int(counts.sum()),
        "num_classes": labels.num_classes,
        "num_levels": labels.num_levels,
        **usage_metrics(counts),
        **rate_metrics(counts, unit_counts, labels.frame_rate_hz, labels.num_levels),
    }
    if matrix.any():
        silent = np.isin(phones, config.silence)
        summary |= {
            "frames_with_phones": int(matrix.sum()),
            "num_phones": len(phones),
            **phone_metrics(matrix),
            "pnmi_speech": phone_metrics(matrix[~silent])["pnmi"],
            "silence_share": float(matrix[silent].sum() / matrix.sum()),
        }
    write_json(out / "summary.json", summary)
    write_json(out / "phones.json", phones)
    with atomic_path(out / "joint.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, matrix)
    parents = {"manifest": manifest.fingerprint, "labels": labels.fingerprint, "codebook": labels.codebook}
    commit(out, "measurement", config.resolved(), parents, ["summary.json", "joint.npy", "phones.json"])
    return summary


def matching_labels(utterance: Utterance, labels: Labels) -> np.ndarray:
    """Level-0 labels of an utterance, at most as many as it has frames; more than one frame of difference is a ValueError."""
    frames = labels[utterance.id]
    if abs(len(frames) - utterance.num_frames) > 1:
        raise ValueError(
            f"{labels.folder}: utterance {utterance.id!r} has {len(frames)} labels and {utterance.num_frames} frames of audio; "
            "the labels belong to other audio, encode this manifest"
        )
    frames = frames[: utterance.num_frames]
    return frames if frames.ndim == 1 else frames[:, 0]


def deduplicated(labels: np.ndarray) -> np.ndarray:
    """Units: labels (frames,) with runs of one class collapsed."""
    return labels[np.flatnonzero(np.diff(labels.astype(np.int64), prepend=-1))]


def usage_metrics(counts: np.ndarray) -> dict[str, float]:
    """Of frame counts by class (K,): `usage`, the share of classes that occur, and `perplexity` 2^H over frames."""
    return {"usage": float((counts > 0).mean()), "perplexity": 2.0 ** entropy_bits(counts)}


def rate_metrics(counts: np.ndarray, unit_counts: np.ndarray, frame_rate_hz: float, num_levels: int = 1) -> dict[str, float]:
    """Units per second and the three bitrates in use, in bits per second. Units are labels with runs collapsed.

    `bitrate_frames`: frame rate · log2 K · levels. `bitrate_units`: units/s · log2 K. `bitrate_entropy`: units/s · H, with H
    the entropy of the units that are sent (ZeroSpeech's definition). Time is frames / frame rate.
    """
    units_per_second = float(unit_counts.sum() / max(1, counts.sum()) * frame_rate_hz)
    class_bits = float(np.log2(len(counts)))
    return {
        "units_per_second": units_per_second,
        "bitrate_frames": frame_rate_hz * class_bits * num_levels,
        "bitrate_units": units_per_second * class_bits,
        "bitrate_entropy": units_per_second * entropy_bits(unit_counts),
    }
