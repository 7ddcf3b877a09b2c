"""The manifest: a Parquet table with one row per utterance, written by `index` and read by everything that needs audio.

Columns: `id`, `path` (absolute), `start` and `num_samples` (samples at the file's own `sample_rate`) and, where known, `split`,
`speaker`, `text` and `phones` (start and end in seconds from the utterance's start, in order). `quarantine.jsonl` beside it
lists what was left out and why.
"""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.artefact import atomic_path, commit, read_meta
from pretrain.audio import SAMPLE_RATE, num_frames

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("speaker", pa.string()),
        pa.field("text", pa.string()),
        pa.field("phones", pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("phone", pa.string())]))),
    ]
)


class Phone(NamedTuple):
    """One phone of an alignment, in seconds from the utterance's start."""

    start: float
    end: float
    phone: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row: where its samples lie, and what is known of them. `start` and `num_samples` count at `sample_rate`."""

    id: str
    path: str
    start: int
    num_samples: int
    sample_rate: int
    split: str | None = None
    speaker: str | None = None
    text: str | None = None
    phones: list[Phone] | None = None

    @property
    def length(self) -> int:
        """Samples at 16 kHz."""
        return self.num_samples * SAMPLE_RATE // self.sample_rate

    @property
    def num_frames(self) -> int:
        """50 Hz frames."""
        return num_frames(self.length)


class Manifest:
    """Read access to a manifest, or to one split of it.

    >>> for utterance in Manifest("runs/demo/manifest").select("test"):  # doctest: +SKIP
    ...     print(utterance.id, utterance.length)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.fingerprint: str = read_meta(folder, "manifest")["fingerprint"]
        self.table: pa.Table = pq.read_table(self.folder / "manifest.parquet", schema=SCHEMA).combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Utterance:
        row = {name: self.table[name][index].as_py() for name in SCHEMA.names}
        if row["phones"] is not None:
            row["phones"] = [Phone(**phone) for phone in row["phones"]]
        return Utterance(**row)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        return list(self.table["id"].to_pylist())

    @property
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz, (len(self),) int64."""
        num_samples, sample_rates = self.table["num_samples"].to_numpy(), self.table["sample_rate"].to_numpy()
        return np.asarray(num_samples * SAMPLE_RATE // sample_rates, dtype=np.int64)

    @property
    def has_text(self) -> bool:
        return bool(self.table["text"].null_count < len(self))

    @property
    def has_phones(self) -> bool:
        return bool(self.table["phones"].null_count < len(self))

    @property
    def splits(self) -> set[str]:
        return set(self.table["split"].drop_null().to_pylist())

    def select(self, split: str | None) -> Self:
        """The rows of one split (None: every row), under the same fingerprint. An unknown split is a ValueError."""
        if split is None:
            return self
        chosen = copy.copy(self)
        chosen.table = self.table.filter(pc.field("split") == split).combine_chunks()
        if len(chosen) == 0:
            raise ValueError(
                f"{self.folder}: no utterances of split {split!r}; it has {', '.join(sorted(self.splits)) or 'no splits'}"
            )
        return chosen

    def take(self, rows: np.ndarray) -> Self:
        """The given row numbers, in that order, under the same fingerprint."""
        chosen = copy.copy(self)
        chosen.table = self.table.take(pa.array(rows)).combine_chunks()
        return chosen


def write_manifest(
    folder: str | Path,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    parents: dict[str, str],
    quarantine: list[dict[str, Any]] | None = None,
) -> str:
    """Write and commit a manifest of `rows` (dicts by column; unknown ones may be left out). Returns its fingerprint.

    `phones` are (start, end, phone) triples; `quarantine` rows say id, path and reason.
    """
    folder, quarantine = Path(folder), quarantine or []
    table = pa.Table.from_pylist([{**row, "path": os.path.abspath(row["path"])} for row in rows], schema=SCHEMA)
    assert len(set(table["id"].to_pylist())) == table.num_rows, "ids are unique"
    with atomic_path(folder / "manifest.parquet") as temporary:
        pq.write_table(table, temporary)
    with atomic_path(folder / "quarantine.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine))
    seconds = sum(row["num_samples"] / row["sample_rate"] for row in rows)
    return commit(
        folder, "manifest", config, parents, ["manifest.parquet", "quarantine.jsonl"],
        num_utterances=len(rows), hours=seconds / 3600, num_quarantined=len(quarantine),
    )  # fmt: skip
