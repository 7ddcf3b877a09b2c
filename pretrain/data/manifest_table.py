"""The Parquet table of a manifest: its columns, and reading that tells damage. `pretrain.data.manifest` knows
what the columns mean."""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.utterance import SAMPLE_RATE

MOST_SAMPLES = 2**48  # of a row: 557 years at 16 kHz, and even at 1 Hz the length at 16 kHz fits into 64 bits

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
        pa.field(
            "phones",
            pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("phone", pa.string())])),
        ),
        pa.field(
            "words",
            pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("word", pa.string())])),
        ),
    ]
)
REQUIRED = [field.name for field in SCHEMA if not field.nullable]


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever Arrow says of a damaged file is a ValueError that names it. Flipped bytes show: each page has
    a checksum."""
    try:
        yield
    except (
        OSError,
        pa.ArrowException,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        MemoryError,
    ) as error:
        if str(error).startswith(str(path)):
            raise
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: missing or damaged ({told}); index the audio again") from None


class Table:
    """`manifest.parquet`: numbers and splits whole, rows by row group."""

    def __init__(self, path: Path, footer: str | None):
        """`footer` is the SHA-256 that it had when it was written (None: by an older wordless)."""
        self.path = path
        self._local = threading.local()  # Arrow's readers are not promised to be safe to share
        with _damage(path):
            # of some damage there Arrow ends the process
            if footer is not None and hash_footer(path) != footer:
                raise ValueError("its end is not what was written")
            self._metadata = pq.read_metadata(path)
            schema = self._metadata.schema.to_arrow_schema()
            groups = [
                self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)
            ]
            self._ends = np.cumsum(groups, dtype=np.int64)
            self.num_rows: int = self._metadata.num_rows
            if min(groups, default=0) < 0 or sum(groups) != self.num_rows:
                raise ValueError(f"{self.num_rows} rows, and {sum(groups)} in its parts")
        self._names = [name for name in SCHEMA.names if name in schema.names]
        if absent := [name for name in REQUIRED if name not in self._names]:
            raise ValueError(
                f"{path}: no column {absent[0]!r}; it has {', '.join(schema.names)}. Index the audio again"
            )
        for name in self._names:
            if schema.field(name).type != SCHEMA.field(name).type:
                raise ValueError(
                    f"{path}: column {name!r} is of {schema.field(name).type}; {SCHEMA.field(name).type} is "
                    "needed"
                )

    def row(self, row: int) -> dict[str, Any]:
        """One row by column. Its row group stays decoded for the thread's next call."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if getattr(self._local, "group", None) != group:
            self._local.columns = self._group(group, self._names).combine_chunks().columns
            self._local.group = group
        place = row - self._start(group)
        return {
            name: column[place].as_py() for name, column in zip(self._names, self._local.columns, strict=True)
        }

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._names:
            return pa.chunked_array([pa.nulls(self.num_rows, SCHEMA.field(name).type)])
        with _damage(self.path):
            column = self._reader.read([name], use_threads=False)[name]
            column.validate(full=True)  # text is UTF-8, lists lie within what they list
            return column

    def blocks(self, rows: np.ndarray, names: Sequence[str]) -> Iterator[tuple[int, int, pa.Table]]:
        """`names` of ascending rows: the row group's `rows[first:last]`, and a table of them. A column that
        is not there has nulls."""
        there = [name for name in names if name in self._names]
        for group in np.unique(np.searchsorted(self._ends, rows, side="right")).tolist():
            start = self._start(group)
            first, last = np.searchsorted(rows, [start, self._ends[group]]).tolist()
            table = self._group(group, there or ["id"])  # of no column there are no rows
            places = rows[first:last] - start
            if not np.array_equal(places, np.arange(self._ends[group] - start)):
                table = table.take(pa.array(places))
            for name in names:
                if name not in there:
                    table = table.append_column(
                        SCHEMA.field(name), pa.nulls(last - first, SCHEMA.field(name).type)
                    )
            yield first, last, table.select(names)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz, (rows,) int64."""
        lengths, done = np.empty(self.num_rows, np.int64), 0
        with _damage(self.path):
            for batch in self._reader.iter_batches(columns=["num_samples", "sample_rate"], use_threads=False):
                num_samples, sample_rate = (column.to_numpy() for column in batch.columns)
                wrong = (num_samples < 0) | (num_samples > MOST_SAMPLES) | (sample_rate < 1)
                if wrong.any():
                    row = int(np.argmax(wrong))
                    raise ValueError(f"row {done + row}: {num_samples[row]} samples at {sample_rate[row]} Hz")
                lengths[done : done + len(batch)] = num_samples * SAMPLE_RATE // sample_rate
                done += len(batch)
            if done < self.num_rows:
                raise ValueError(f"{done} of {self.num_rows} rows")
        lengths.flags.writeable = False  # shared by everybody who reads this file
        return lengths

    @cached_property
    def splits(self) -> tuple[list[str | None], np.ndarray]:
        """The names of the splits, None among them where rows have none, and the number of each row's,
        (rows,) int32."""
        if "split" not in self._names:
            return [None], np.zeros(self.num_rows, np.int32)
        numbers: dict[str | None, int] = {}
        codes, done = np.empty(self.num_rows, np.int32), 0
        with _damage(self.path):
            for batch in self._reader.iter_batches(columns=["split"], use_threads=False):
                encoded = batch.column(0).dictionary_encode(null_encoding="encode")
                known = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
                codes[done : done + len(batch)] = np.array(known, np.int32)[encoded.indices.to_numpy()]
                done += len(batch)
            if done < self.num_rows:
                raise ValueError(f"{done} of {self.num_rows} rows")
        return list(numbers), codes

    def has(self, name: str, rows: np.ndarray | None) -> bool:
        """Whether any of the rows (None: any at all) has a value. The file's statistics say where to look."""
        if name not in self._names:
            return False
        columns = [
            i
            for i in range(len(self._metadata.schema))
            if self._metadata.schema.column(i).path.split(".")[0] == name
        ]
        rows = None if rows is None else np.sort(rows)
        groups = (
            range(len(self._ends))
            if rows is None
            else np.unique(np.searchsorted(self._ends, rows, side="right")).tolist()
        )
        for group in groups:
            chunks = [self._metadata.row_group(group).column(i) for i in columns]
            if all(
                chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values
                for chunk in chunks
            ):
                continue
            if rows is None:
                return True
            valid = self._group(group, [name])[name].is_valid().to_numpy()
            first, last = np.searchsorted(rows, [self._start(group), self._ends[group]])
            if valid[rows[first:last] - self._start(group)].any():
                return True
        return False

    def _group(self, group: int, names: list[str]) -> pa.Table:
        """Some columns of a row group."""
        with _damage(self.path):
            table = self._reader.read_row_group(group, names, use_threads=False)
            if len(table) != self._ends[group] - self._start(group):
                raise ValueError(
                    f"{len(table)} of {self._ends[group] - self._start(group)} rows in part {group}"
                )
            table.validate(full=True)
            return table

    @property
    def _reader(self) -> pq.ParquetFile:
        if not hasattr(self._local, "reader"):
            self._local.reader = pq.ParquetFile(
                self.path, metadata=self._metadata, pre_buffer=False, page_checksum_verification=True
            )
        return self._local.reader

    def _start(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0


def hash_footer(path: Path) -> str:
    """SHA-256 of where and what everything in a Parquet file is: its end, which says its own length in 4 of
    the last 8 bytes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        file.seek(max(0, size - 8 - int.from_bytes(file.read(4), "little")))
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """`column.take(rows)`, for which Arrow would join the chunks, which it cannot beyond 2 GiB of text."""
    order = np.argsort(rows, kind="stable")
    ascending, start, taken = rows[order], 0, []
    for chunk in column.chunks:
        first, last = np.searchsorted(ascending, [start, start + len(chunk)])
        if first < last:
            taken.append(chunk.take(pa.array(ascending[first:last] - start)))
        start += len(chunk)
    joined = pa.chunked_array(taken, column.type)
    return joined if np.array_equal(ascending, rows) else joined.take(pa.array(np.argsort(order)))
