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
from pretrain.audio import phone_frames
from pretrain.config import Config
from pretrain.labels import Labels
from pretrain.manifest import Manifest, Utterance
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


class JointCounts:
    """Frames by phone and class, collected utterance by utterance."""

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._rows: dict[str, np.ndarray] = {}

    def add(self, utterance: Utterance, labels: np.ndarray) -> None:
        assert utterance.phones is not None
        names, which = np.unique(phone_frames(utterance.phones, len(labels)), return_inverse=True)
        pairs, counts = np.unique(which * self._num_classes + labels, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            name = str(names[pair // self._num_classes])
            row = self._rows.setdefault(name, np.zeros(self._num_classes, dtype=np.int64))
            row[pair % self._num_classes] += count

    def matrix(self) -> tuple[list[str], np.ndarray]:
        """Phones in alphabetical order, and their counts (phones, classes) int64."""
        phones = sorted(self._rows)
        return phones, np.array([self._rows[phone] for phone in phones], dtype=np.int64).reshape(-1, self._num_classes)


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of a distribution given by counts of any shape; 0 of none."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum() + 0.0)


def phone_metrics(joint: np.ndarray) -> dict[str, float]:
    """Of joint counts (phones, classes): with y the phone and z the class, and p over frames,

    `phone_purity` Σ_z max_y p(y,z), `cluster_purity` Σ_y max_z p(y,z), `pnmi` I(y;z)/H(y) (Hsu et al. 2021, equation 6; it
    is also homogeneity), `completeness` I/H(z), `v_measure` their harmonic mean. A zero entropy leaves nothing to tell: 1.
    """
    total = max(1, joint.sum())
    phone_bits, class_bits = entropy_bits(joint.sum(axis=1)), entropy_bits(joint.sum(axis=0))
    shared = max(0.0, phone_bits + class_bits - entropy_bits(joint))
    pnmi = shared / phone_bits if phone_bits else 1.0
    completeness = shared / class_bits if class_bits else 1.0
    return {
        "pnmi": pnmi,
        "phone_purity": float(joint.max(axis=0, initial=0).sum() / total),
        "cluster_purity": float(joint.max(axis=1, initial=0).sum() / total),
        "completeness": completeness,
        "v_measure": 2 * pnmi * completeness / (pnmi + completeness) if pnmi + completeness else 0.0,
    }


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
