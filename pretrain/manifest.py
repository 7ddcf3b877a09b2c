"""The manifest: a Parquet table with one row per utterance, written by `index` and read by everything that needs audio.

Columns: `id`, `path` (below the `root` that `meta.json` records, or absolute), `start` and `num_samples` (samples at the file's
own `sample_rate`), `member_offset` and `member_size` (bytes, where the recording is a member of the tar at `path`) and, where
known, `split`, `speaker`, `text`, and `phones` and `words` (start and end in seconds from the utterance's start, in order).
`quarantine.jsonl` beside it lists what was left out and why.

Tens of millions of rows are nothing special: opening reads two numbers and the split of each row, and a row is read, with the
thousand beside it, when it is asked for.
"""

import copy
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.artefact import atomic_path, commit, read_meta
from pretrain.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, Member, num_frames

ROW_GROUP = 1024  # rows read together: reading one at random takes half a millisecond, and ten million make 9,766 groups

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("member_offset", pa.int64()),
        pa.field("member_size", pa.int64()),
        pa.field("split", pa.string()),
        pa.field("speaker", pa.string()),
        pa.field("text", pa.string()),
        pa.field("phones", pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("phone", pa.string())]))),
        pa.field("words", pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("word", pa.string())]))),
    ]
)


class Phone(NamedTuple):
    """One phone of an alignment, in seconds from the utterance's start."""

    start: float
    end: float
    phone: str


class Word(NamedTuple):
    """One word of an alignment, in seconds from the utterance's start."""

    start: float
    end: float
    word: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row: where its samples lie, and what is known of them. `start` and `num_samples` count at `sample_rate`.

    In a tar at `path`, the recording is the `member_size` bytes from `member_offset`.
    """

    id: str
    path: str
    start: int
    num_samples: int
    sample_rate: int
    split: str | None = None
    speaker: str | None = None
    text: str | None = None
    phones: list[Phone] | None = None
    member_offset: int | None = None
    member_size: int | None = None
    words: list[Word] | None = None

    @property
    def member(self) -> Member | None:
        """Where the recording lies in the tar at `path`; None for a file of its own."""
        return None if self.member_offset is None or self.member_size is None else Member(self.member_offset, self.member_size)

    @property
    def length(self) -> int:
        """Samples at 16 kHz."""
        return self.num_samples * SAMPLE_RATE // self.sample_rate

    @property
    def num_frames(self) -> int:
        """50 Hz frames."""
        return num_frames(self.length)


class Manifest:
    """Read access to a manifest, or to one split of it; safe to read from several threads.

    Where the audio has moved since it was indexed, write its new folder as `root` in meta.json.

    >>> for utterance in Manifest("runs/demo/manifest").select("test"):  # doctest: +SKIP
    ...     print(utterance.id, utterance.length)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        meta = read_meta(folder, "manifest")
        self.fingerprint: str = meta["fingerprint"]
        self.root: str = meta.get("root", "/")
        self._file = _File(self.folder / "manifest.parquet")
        self._rows: np.ndarray | None = None  # row numbers in the file; None: all of them, in order

    def __len__(self) -> int:
        return self._file.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Utterance:
        index = range(len(self))[index]
        row = self._file.row(index if self._rows is None else int(self._rows[index]))
        row["path"] = os.path.join(self.root, row["path"])
        if row["phones"] is not None:
            row["phones"] = [Phone(**phone) for phone in row["phones"]]
        if row.get("words") is not None:  # not in manifests from before there were word times
            row["words"] = [Word(**word) for word in row["words"]]
        return Utterance(**row)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it is in the file, read now: a value for each row."""
        column = self._file.column(name)
        return column if self._rows is None else column.take(pa.array(self._rows))

    def blocks(self, names: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Some columns of every row, a row group at a time and in the order of the file, for what no memory holds at once.

        Yields the numbers that rows have here, (n,) int64, and their columns as they are in the file. Row groups without one of these
        rows are not read.
        """
        if self._rows is None:
            places, rows = np.arange(len(self)), np.arange(len(self))
        else:
            places = np.argsort(self._rows, kind="stable")
            rows = self._rows[places]
        for first, last, table in self._file.blocks(rows, names):
            yield places[first:last], table

    @property
    def ids(self) -> list[str]:
        """Every id, as Python strings: `column("id")` is a tenth of the size."""
        return list(self.column("id").to_pylist())

    @property
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz, (len(self),) int64, not to be written to."""
        return self._file.lengths if self._rows is None else self._file.lengths[self._rows]

    @property
    def num_frames(self) -> np.ndarray:
        """50 Hz frames, (len(self),) int64."""
        return np.maximum(0, (self.lengths - MIN_SAMPLES) // HOP + 1)

    @property
    def has_text(self) -> bool:
        return self._file.has("text", self._rows)

    @property
    def has_phones(self) -> bool:
        return self._file.has("phones", self._rows)

    @property
    def has_words(self) -> bool:
        return self._file.has("words", self._rows)

    @property
    def splits(self) -> set[str]:
        names, codes = self._splits
        counts = np.bincount(codes, minlength=len(names))
        return {name for name, count in zip(names, counts, strict=True) if count and name is not None}

    @property
    def _splits(self) -> tuple[list[str | None], np.ndarray]:
        names, codes = self._file.splits
        return names, codes if self._rows is None else codes[self._rows]

    def select(self, split: str | None) -> Self:
        """The rows of one split (None: every row), under the same fingerprint. An unknown split is a ValueError."""
        if split is None:
            return self
        if split not in self.splits:
            raise ValueError(
                f"{self.folder}: no utterances of split {split!r}; it has {', '.join(sorted(self.splits)) or 'no splits'}"
            )
        names, codes = self._splits
        return self.take(np.flatnonzero(codes == names.index(split)))

    def take(self, rows: np.ndarray) -> Self:
        """The given row numbers, in that order, under the same fingerprint."""
        chosen = copy.copy(self)
        chosen._rows = np.asarray(rows, np.int64) if self._rows is None else self._rows[rows]
        return chosen


class _File:
    """`manifest.parquet`: numbers and splits whole, rows by row group."""

    def __init__(self, path: Path):
        self._path = path
        self._local = threading.local()  # Arrow's readers are not promised to be safe to share
        try:
            self._metadata = pq.read_metadata(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path}: missing or damaged ({error}); index the audio again") from None
        self._names = [name for name in SCHEMA.names if name in self._metadata.schema.to_arrow_schema().names]
        groups = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self.num_rows: int = self._metadata.num_rows

    def row(self, row: int) -> dict[str, Any]:
        """One row by column. Its row group stays decoded for the thread's next call."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if getattr(self._local, "group", None) != group:
            self._local.columns = self._reader.read_row_group(group, self._names, use_threads=False).combine_chunks().columns
            self._local.group = group
        place = row - self._start(group)
        return {name: column[place].as_py() for name, column in zip(self._names, self._local.columns, strict=True)}

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._names:
            return pa.chunked_array([pa.nulls(self.num_rows, SCHEMA.field(name).type)])
        return self._reader.read([name], use_threads=False)[name]

    def blocks(self, rows: np.ndarray, names: Sequence[str]) -> Iterator[tuple[int, int, pa.Table]]:
        """`names` of ascending rows: the row group's `rows[first:last]`, and a table of them. A column that is not there has nulls."""
        there = [name for name in names if name in self._names]
        for group in np.unique(np.searchsorted(self._ends, rows, side="right")).tolist():
            start = self._start(group)
            first, last = np.searchsorted(rows, [start, self._ends[group]]).tolist()
            table = self._reader.read_row_group(group, there or ["id"], use_threads=False)  # of no column there are no rows
            places = rows[first:last] - start
            if not np.array_equal(places, np.arange(self._ends[group] - start)):
                table = table.take(pa.array(places))
            for name in names:
                if name not in there:
                    table = table.append_column(SCHEMA.field(name), pa.nulls(last - first, SCHEMA.field(name).type))
            yield first, last, table.select(names)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz, (rows,) int64."""
        lengths, done = np.empty(self.num_rows, np.int64), 0
        for batch in self._reader.iter_batches(columns=["num_samples", "sample_rate"], use_threads=False):
            num_samples, sample_rate = (column.to_numpy() for column in batch.columns)
            lengths[done : done + len(batch)] = num_samples * SAMPLE_RATE // sample_rate
            done += len(batch)
        lengths.flags.writeable = False  # shared by everybody who reads this file
        return lengths

    @cached_property
    def splits(self) -> tuple[list[str | None], np.ndarray]:
        """The names of the splits, None among them where rows have none, and the number of each row's, (rows,) int32."""
        numbers: dict[str | None, int] = {}
        codes, done = np.empty(self.num_rows, np.int32), 0
        for batch in self._reader.iter_batches(columns=["split"], use_threads=False):
            encoded = batch.column(0).dictionary_encode(null_encoding="encode")
            known = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
            codes[done : done + len(batch)] = np.array(known, np.int32)[encoded.indices.to_numpy()]
            done += len(batch)
        return list(numbers), codes

    def has(self, name: str, rows: np.ndarray | None) -> bool:
        """Whether any of the rows (None: any at all) has a value. The file's statistics say where to look."""
        if name not in self._names:
            return False
        columns = [i for i in range(len(self._metadata.schema)) if self._metadata.schema.column(i).path.split(".")[0] == name]
        rows = None if rows is None else np.sort(rows)
        groups = range(len(self._ends)) if rows is None else np.unique(np.searchsorted(self._ends, rows, side="right")).tolist()
        for group in groups:
            chunks = [self._metadata.row_group(group).column(i) for i in columns]
            if all(chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values for chunk in chunks):
                continue
            if rows is None:
                return True
            valid = self._reader.read_row_group(group, [name], use_threads=False)[name].is_valid().to_numpy()
            first, last = np.searchsorted(rows, [self._start(group), self._ends[group]])
            if valid[rows[first:last] - self._start(group)].any():
                return True
        return False

    @property
    def _reader(self) -> pq.ParquetFile:
        if not hasattr(self._local, "reader"):
            self._local.reader = pq.ParquetFile(self._path, metadata=self._metadata, pre_buffer=False)
        return self._local.reader

    def _start(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0


def write_manifest(
    folder: str | Path,
    rows: Iterable[dict[str, Any]],
    config: dict[str, Any],
    parents: dict[str, str],
    quarantine: list[dict[str, Any]] | None = None,
    root: str = "/",
) -> str:
    """Write and commit a manifest of `rows` (dicts by column; unknown ones may be left out), a row group at a time.

    `phones` and `words` are (start, end, name) triples; `quarantine` rows say id, path and reason. Paths below `root` are stored relative
    to it, so that the fingerprint, which this returns, does not change when a corpus moves.
    """
    root, rows = os.path.abspath(root), iter(rows)

    def tables() -> Iterator[pa.Table]:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            stored = [{**row, "path": _below(os.path.abspath(row["path"]), root)} for row in group]
            yield pa.Table.from_pylist(stored, schema=SCHEMA)

    return _write(Path(folder), tables(), config, parents, quarantine or [], root)


def copy_manifest(folder: str | Path, manifest: Manifest, config: dict[str, Any], parents: dict[str, str], **extra: Any) -> str:
    """Write and commit the rows of `manifest`, a split or a `take` of another, as a manifest of its own, in the order of the file.

    Root and paths stay as they are; `extra` goes into meta.json. Returns the fingerprint.
    """

    def tables() -> Iterator[pa.Table]:
        held: list[pa.Table] = []
        for _, table in manifest.blocks(SCHEMA.names):  # of a few rows each, where few are chosen
            held.append(table.cast(SCHEMA))
            if sum(map(len, held)) >= ROW_GROUP:
                joined = pa.concat_tables(held)
                yield joined[:ROW_GROUP].combine_chunks()
                held = [joined[ROW_GROUP:]]
        if sum(map(len, held)):
            yield pa.concat_tables(held).combine_chunks()

    return _write(Path(folder), tables(), config, parents, [], manifest.root, **extra)


def _write(
    folder: Path, tables: Iterable[pa.Table], config: dict[str, Any], parents: dict[str, str], quarantine: list[dict[str, Any]],
    root: str, **extra: Any,
) -> str:  # fmt: skip
    """A manifest of `tables`, each a row group."""
    hashes: list[np.ndarray] = []
    seconds = 0.0
    with atomic_path(folder / "manifest.parquet") as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
            hashes.append(np.array([hash(name) for name in table["id"].to_pylist()]))
            seconds += float((table["num_samples"].to_numpy() / table["sample_rate"].to_numpy()).sum())
    count = sum(map(len, hashes))
    # Sixty-four bits of each id instead of ten million strings: two ids agree by chance once in 400,000 such manifests.
    assert count == 0 or len(np.unique(np.concatenate(hashes))) == count, "ids are unique"
    with atomic_path(folder / "quarantine.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine), encoding="utf-8")
    return commit(
        folder, "manifest", config, parents, ["manifest.parquet"],
        root=root, num_utterances=count, hours=seconds / 3600, num_quarantined=len(quarantine), **extra,
    )  # fmt: skip


def _below(path: str, root: str) -> str:
    return path.removeprefix(os.path.join(root, ""))
