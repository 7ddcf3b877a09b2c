"""What the benchmark rates measures, each in a process of its own."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 16000


SHORT = 1680  # samples of a drawn row, five frames: what a row costs does not depend on its length


SHARD_ROWS = 100_000


def _fresh(folder: Path) -> Path:
    return folder / f"out-{time.monotonic_ns()}"


def index_audio(folder: Path, kind: str, verify: str) -> None:
    """The verb `index` with one thread, to a manifest."""
    from pretrain.data.indexing import IndexConfig, index

    out = str(_fresh(folder))
    index(IndexConfig(source=str(folder / kind), out=out, verify=verify, workers=1))  # type: ignore[arg-type]


def index_rows(folder: Path, count: int) -> None:
    """The verb `index` on a list of so many segments of one recording: its memory, whatever the number of
    files."""
    from pretrain.data.indexing import IndexConfig, index

    rows = (
        {
            "id": row["id"],
            "speaker": row["speaker"],
            "audio_filepath": "wav/00000.wav",
            "offset": 0,
            "duration": 0.1,
        }
        for row in draw_rows(count)
    )
    source = folder / f"rows-{count}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(IndexConfig(source=str(source), out=str(_fresh(folder)), verify="header", workers=1))


def plan_epoch(folder: Path) -> None:
    """What a rank holds of the manifest when it trains: split, lengths, and the first epoch's plan."""
    from pretrain.data.batches import BatchConfig, SpeechBatches
    from pretrain.data.manifest import Manifest

    SpeechBatches(Manifest(folder / "manifest").select("train"), BatchConfig(batch_seconds=24.0), 0).plan(0)


def start_hubert(folder: Path) -> None:
    """The same with labels, which are checked against the manifest."""
    from pretrain.data.batches import BatchConfig, SpeechBatches
    from pretrain.data.labels import Labels
    from pretrain.data.manifest import Manifest
    from pretrain.objectives.hubert import check_label_counts

    batches = SpeechBatches(Manifest(folder / "manifest").select("train"), BatchConfig(batch_seconds=24.0), 0)
    labels = Labels(folder / "labels")
    check_label_counts(batches, labels)
    assert len(batches.plan(0)) and labels.num_classes


def draw_sample(folder: Path) -> None:
    """The plan of `cluster`: which frames to visit."""
    from pretrain.data.manifest import Manifest
    from quantize.subsample import Sample

    Sample(Manifest(folder / "manifest").select("train"), 1000, 0)


def finish_labels(folder: Path) -> None:
    """What the last part of an `encode` does when every shard stands."""
    from pretrain.data.labels import commit_labels
    from pretrain.data.manifest import Manifest

    rows = Manifest(folder / "manifest").select("train")
    num_shards = len(list((folder / "labels").glob("shard_*.npy")))
    commit_labels(
        folder / "labels",
        num_shards,
        {},
        {},
        codebook="drawn",
        num_classes=100,
        expected_ids=rows.column("id"),
        expected_frames=rows.num_frames,
    )


def pack_labels(folder: Path) -> None:
    """The verb `pack`."""
    from units.packing import pack
    from units.packing_config import PackConfig

    out = _fresh(folder)
    pack(PackConfig(manifest=str(folder / "manifest"), labels=str(folder / "labels"), out=str(out)))
    if not (folder / "units").exists():
        os.symlink(out, folder / "units")


def open_units(folder: Path) -> None:
    """What a rank holds of a unit corpus when it trains a language model: the documents, and an epoch's
    plan."""
    from units.corpus.patterns import Pattern
    from units.corpus.sequences import Sequences
    from units.corpus.unit_corpus import UnitCorpus
    from units.lm.language_model import Pieces

    corpus = UnitCorpus(folder / "units")
    pattern = Pattern("parallel", corpus.vocabulary.sizes)
    pieces = Pieces(Sequences(corpus, corpus.documents("train"), pattern), pattern, 2048, None)
    pieces.batches(np.random.default_rng(0).permutation(len(pieces)), 131072)


def encode_mfcc(folder: Path) -> None:
    """The verb `encode` with a codebook of MFCC, decoding in one thread."""
    from quantize.encoding import encode
    from quantize.encoding_plan import EncodeConfig

    encode(
        EncodeConfig(
            manifest=str(folder / "manifest"),
            codebook=str(folder / "codebook"),
            out=str(_fresh(folder)),
            workers=1,
        )
    )


def collate_hubert(folder: Path) -> None:
    """An epoch of HuBERT's micro-batches as a loader thread makes them: decode, crop, mask, labels, pack."""
    from pretrain.config import parse_config
    from pretrain.data.labels import Labels
    from pretrain.data.manifest import Manifest
    from pretrain.objectives.hubert import HubertTask
    from pretrain.objectives.pretraining import PretrainConfig

    keys = {
        "out": "unused",
        "manifest": str(folder / "manifest"),
        "labels": str(folder / "labels"),
        "objective": "hubert",
        "valid_split": "",
        "encoder": {"architecture": "tiny"},
        "training": {"max_steps": 1},
    }
    task = HubertTask(
        parse_config(PretrainConfig, keys, "rates"), Manifest(folder / "manifest"), Labels(folder / "labels")
    )
    for items in task.plan(0):
        task.collate(items, 0)


def hash_files(folder: Path) -> None:
    """SHA-256 as `commit` takes it."""
    from pretrain.store.hashes import sha256_file

    sha256_file(folder / "bytes")


def draw_rows(count: int) -> Iterator[dict[str, Any]]:
    """Utterances named like those of Libri-Light, ids of 40 bytes, a thousand of a speaker."""
    for number in range(count):
        speaker = f"{number // 1000:06d}"
        name = f"medium/{speaker}/a_book_of_{number // 100:08d}_{number:07d}"
        yield {
            "id": name,
            "path": f"/corpus/{name}.flac",
            "start": 0,
            "num_samples": SHORT,
            "sample_rate": SAMPLE_RATE,
            "split": "train",
            "speaker": speaker,
        }
