"""Which transcripts can be used, and why others cannot."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.subsets import (
    examine,
    problems_message,
    transcribed,
)
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.store.disk import atomic_path


class Source(NamedTuple):
    """A split, and which of its rows can be learned from or judged by."""

    manifest: Manifest
    rows: np.ndarray
    num_left_out: int  # with a transcript, but too short or too long
    problems: list[dict[str, str]]


def usable(
    manifest: Manifest,
    config: FinetuneConfig,
    limits: BatchConfig,
    vocabulary: Vocabulary,
    labels: Labels | None,
) -> Source:
    """Rows that can be learned from or judged by. What is wrong with transcripts is an error that names them,
    where the config says so."""
    known = transcribed(manifest, config.text)
    if not len(known):
        raise ValueError(
            f"{manifest.folder}: no utterance of {config.split!r} has {kind_of_target(config.text)}; "
            "`finetune` needs some"
        )
    rows = np.intersect1d(known, SpeechBatches(manifest, limits, 0, crop=False).items, assume_unique=True)
    if not len(rows):
        raise ValueError(
            f"{manifest.folder}: every utterance with {kind_of_target(config.text)} is shorter than "
            f"batches.min_seconds = {limits.min_seconds:g} or longer than batches.crop_seconds = "
            f"{limits.crop_seconds:g}"
        )
    chosen = manifest.take(rows)
    frames = config.units.counts(labels, chosen) if labels else chosen.num_frames
    kept, problems = examine(manifest, rows, config.text, vocabulary, frames)
    if problems and config.bad_transcripts == "error":
        raise ValueError(
            f'{problems_message(manifest, problems)}\nMend them, or set bad_transcripts = "quarantine" to '
            "leave them out"
        )
    if not len(kept):
        raise ValueError(f"{problems_message(manifest, problems)}\nNone is left to learn from")
    return Source(manifest, kept, len(known) - len(rows), problems)


def write_quarantine(path: Path, problems: list[dict[str, str]]) -> None:
    """A line for each transcript that was left out; no file where there is none."""
    if problems:
        with atomic_path(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in problems), encoding="utf-8"
            )
    else:
        path.unlink(missing_ok=True)


def kind_of_target(text: TextConfig) -> str:
    """For messages: what a recogniser learns to write."""
    return "phones (index with `alignments`)" if text.column == "phones" else "a transcript"
