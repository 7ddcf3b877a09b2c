"""How good units are, from counts: usage, runs, bitrates; and the names that all measures go by in tables.

Everything here is over 50 Hz frames. Information shared with phones and the purities are in
pretrain/objectives/pnmi.py, ABX in abx.py, the probes in probes.py; the verb `measure`, which puts them
together, is in measuring.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.data.labels import Labels
from pretrain.data.utterance import Utterance
from pretrain.objectives.pnmi import entropy_bits

# By group: key of a summary, how tables call it, and its format, in the order of the tables.
MEASURES = {
    "Data": {
        "utterances": ("utterances", ",d"),
        "frames": ("frames of 20 ms", ",d"),
        "num_classes": ("classes (K)", ",d"),
        "num_levels": ("levels", "d"),
        "judged_utterances": ("utterances for ABX and probes", ",d"),
    },
    "Phones": {
        "pnmi": ("PNMI", ".3f"),
        "pnmi_speech": ("PNMI without silence", ".3f"),
        "phone_purity": ("phone purity", ".3f"),
        "cluster_purity": ("cluster purity", ".3f"),
        "completeness": ("completeness", ".3f"),
        "v_measure": ("V-measure", ".3f"),
    },
    "Use": {
        "usage": ("classes in use", ".1%"),
        "usage_by_level": ("classes in use, by level", ".1%"),
        "perplexity": ("perplexity", ".1f"),
        "perplexity_by_level": ("perplexity, by level", ".1f"),
        "units_per_second": ("units per second, deduplicated", ".1f"),
        "bitrate_frames": ("bit/s, every frame", ".0f"),
        "bitrate_units": ("bit/s, deduplicated", ".0f"),
        "bitrate_entropy": ("bit/s, deduplicated, at their entropy", ".0f"),
        "bitrate_joint": ("bit/s, all levels, at their entropies", ".0f"),
    },
    "ABX error": {
        "abx_within": ("units, within speaker", ".2%"),
        "abx_across": ("units, across speakers", ".2%"),
        "abx_within_centroids": ("centroids, within speaker", ".2%"),
        "abx_across_centroids": ("centroids, across speakers", ".2%"),
        "abx_within_features": ("features, within speaker", ".2%"),
        "abx_across_features": ("features, across speakers", ".2%"),
    },
    "Probes": {
        "phone_accuracy": ("phone told from a unit", ".1%"),
        "phone_accuracy_features": ("phone told from features", ".1%"),
        "phone_majority": ("phone, chance", ".1%"),
        "speaker_frame_accuracy": ("speaker told from a unit", ".1%"),
        "speaker_frame_accuracy_features": ("speaker told from features", ".1%"),
        "speaker_frame_majority": ("speaker, chance", ".1%"),
        "speaker_accuracy": ("speaker told from an utterance's units", ".1%"),
        "speaker_accuracy_features": ("speaker told from its mean features", ".1%"),
        "speaker_chance": ("speaker of an utterance, chance", ".1%"),
    },
    "Quantisation": {
        "quantisation_error": ("squared error / variance", ".3f"),
        "quantisation_error_by_level": ("squared error / variance, by level", ".3f"),
    },
}
FORMATS = {key: form for group in MEASURES.values() for key, (_, form) in group.items()}


def table_groups(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """By group, a row of texts for each measure that any column has: its title, then its value in each
    column, a dash for none."""
    groups = {
        group: [
            [title, *(format_measure(key, column.get(key)) for column in columns)]
            for key, (title, _) in measures.items()
            if any(key in column for column in columns)
        ]
        for group, measures in MEASURES.items()
    }
    return {group: rows for group, rows in groups.items() if rows}


def measures_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The measures of several units as a table for a terminal: a line a measure, a column for each name."""
    groups = table_groups(list(columns.values()))
    rows = [
        row
        for group, rows in groups.items()
        for row in ([group, *("" for _ in columns)], *([f"  {row[0]}", *row[1:]] for row in rows))
    ]
    return text_table(["", *columns], rows)


def format_measure(key: str, value: Any) -> str:
    """A value as tables show it; the values of a list, such as one a level, in turn; a dash for None."""
    if isinstance(value, list):
        return ", ".join(format_measure(key, item) for item in value)
    return "\N{EN DASH}" if value is None else format(value, FORMATS[key])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join(
            [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        ).rstrip()
        for row in ([] if not any(header) else [header]) + list(rows)
    )


def matching_labels(utterance: Utterance, labels: Labels) -> np.ndarray:
    """Level-0 labels of an utterance, at most as many as it has frames; more than one frame of difference is
    a ValueError."""
    return matching_levels(utterance, labels)[:, 0]


def matching_levels(utterance: Utterance, labels: Labels) -> np.ndarray:
    """The same of every level, (frames, levels)."""
    frames = labels[utterance.id]
    if abs(len(frames) - utterance.num_frames) > 1:
        raise ValueError(
            f"{labels.folder}: utterance {utterance.id!r} has {len(frames)} labels and "
            f"{utterance.num_frames} frames of audio; the labels belong to other audio, encode this manifest"
        )
    return frames[: utterance.num_frames].reshape(-1, labels.num_levels)


def deduplicated(labels: np.ndarray) -> np.ndarray:
    """Units: labels (frames,) or (frames, levels) with runs of one class, or of one class at every level,
    collapsed."""
    if labels.ndim == 1:
        return labels[np.flatnonzero(np.diff(labels.astype(np.int64), prepend=-1))]
    changes = np.diff(labels.astype(np.int64), prepend=-1, axis=0).any(axis=1)
    return labels[changes]


def usage_metrics(counts: np.ndarray) -> dict[str, float]:
    """Of frame counts by class (K,): `usage`, the share of classes that occur, and `perplexity` 2^H over
    frames."""
    return {"usage": float((counts > 0).mean()), "perplexity": 2.0 ** entropy_bits(counts)}


def rate_metrics(
    counts: np.ndarray, unit_counts: np.ndarray, frame_rate_hz: float, num_levels: int = 1
) -> dict[str, float]:
    """Units per second and the three bitrates in use, in bits per second. Units are labels with runs
    collapsed.

    `bitrate_frames`: frame rate · log2 K · levels. `bitrate_units`: units/s · log2 K. `bitrate_entropy`:
    units/s · H, with H the entropy of the units that are sent (ZeroSpeech's definition). Time is frames /
    frame rate.
    """
    units_per_second = float(unit_counts.sum() / max(1, counts.sum()) * frame_rate_hz)
    class_bits = float(np.log2(len(counts)))
    return {
        "units_per_second": units_per_second,
        "bitrate_frames": frame_rate_hz * class_bits * num_levels,
        "bitrate_units": units_per_second * class_bits,
        "bitrate_entropy": units_per_second * entropy_bits(unit_counts),
    }


def level_metrics(counts: np.ndarray, joint_counts: np.ndarray, frame_rate_hz: float) -> dict[str, Any]:
    """Of frame counts (levels, K), and of the counts (levels, K) that are left where runs of the same class
    at every level collapse:

    `usage_by_level`, `perplexity_by_level`, and `bitrate_joint`: the rate of those joint units times the sum
    of the levels' entropies, in bits per second: each level coded by itself, so an upper bound of what a
    joint code would need.
    """
    usage = [usage_metrics(level) for level in counts]
    per_second = joint_counts[0].sum() / max(1, counts[0].sum()) * frame_rate_hz
    return {
        "usage_by_level": [level["usage"] for level in usage],
        "perplexity_by_level": [level["perplexity"] for level in usage],
        "bitrate_joint": float(per_second * sum(entropy_bits(level) for level in joint_counts)),
    }
