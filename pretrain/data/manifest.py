"""The manifest: a Parquet table with one row per utterance, written by `index` and read by everything that
needs audio.

Columns: `id`, `path` (below the `root` that `meta.json` records, or absolute), `start` and `num_samples`
(samples at the file's own `sample_rate`), `member_offset` and `member_size` (bytes, where the recording is a
member of the tar at `path`) and, where known, `split`, `speaker`, `text`, and `phones` and `words` (start and
end in seconds from the utterance's start, in order). `quarantine.jsonl` beside it lists what was left out and
why.

Tens of millions of rows are nothing special: opening reads two numbers and the split of each row, and a row
is read, with the thousand beside it, when it is asked for.
"""

import copy
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.manifest_table import MOST_SAMPLES, REQUIRED, SCHEMA, Table, hash_footer, take
from pretrain.data.utterance import HOP, MIN_SAMPLES, Phone, Utterance, Word
from pretrain.store.artefact import commit, read_meta
from pretrain.store.disk import atomic_path

ROW_GROUP = 1024  # rows read together: one at random takes half a millisecond; ten million are 9,766 groups


Timed = TypeVar("Timed", Phone, Word)


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
        if not isinstance(self.root, str):
            raise ValueError(
                f"{folder}/meta.json: root is {self.root!r}; the folder that paths lie below is needed"
            )
        self._file = Table(self.folder / "manifest.parquet", meta.get("footer"))
        self._rows: np.ndarray | None = None  # row numbers in the file; None: all of them, in order

    def __len__(self) -> int:
        return self._file.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Utterance:
        index = range(len(self))[index]
        number = index if self._rows is None else int(self._rows[index])
        row = self._file.row(number)
        try:
            _require_sound(row)
            row["path"] = os.path.join(self.root, row["path"])
            row["phones"] = _in_order(Phone, row.get("phones"))
            # not in manifests from before there were word times
            row["words"] = _in_order(Word, row.get("words"))
        except ValueError as error:
            raise ValueError(
                f"{self._file.path}: row {number}, id {row['id']!r}: {error}; index the audio again"
            ) from None
        return Utterance(**row)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it is in the file, read now: a value for each row."""
        column = self._file.column(name)
        return column if self._rows is None else take(column, self._rows)

    def blocks(self, names: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Some columns of every row, a row group at a time and in the order of the file, for what no memory
        holds at once.

        Yields the numbers that rows have here, (n,) int64, and their columns as they are in the file. Row
        groups without one of these rows are not read.
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
        """The rows of one split (None: every row), under the same fingerprint. An unknown split is a
        ValueError."""
        if split is None:
            return self
        if split not in self.splits:
            raise ValueError(
                f"{self.folder}: no utterances of split {split!r}; it has "
                f"{', '.join(sorted(self.splits)) or 'no splits'}"
            )
        names, codes = self._splits
        return self.take(np.flatnonzero(codes == names.index(split)))

    def take(self, rows: np.ndarray) -> Self:
        """The given row numbers, in that order, under the same fingerprint."""
        chosen = copy.copy(self)
        chosen._rows = np.asarray(rows, np.int64) if self._rows is None else self._rows[rows]
        return chosen


def _in_order(kind: type[Timed], triples: list[dict[str, Any]] | None) -> list[Timed] | None:
    """Phones or words of a row, which are in order and without overlap beyond a millisecond, as `index`
    writes them."""
    if triples is None:
        return None
    timed, reached = [kind(**triple) if triple else None for triple in triples], -math.inf
    for one in timed:
        if one is None or None in one or not reached - 0.001 <= one[0] <= one[1] < math.inf:
            raise ValueError(f"{kind.__name__.lower()}s are not in order, {one} after {reached} s")
        reached = one[1]
    return [one for one in timed if one is not None]


def _require_sound(row: dict[str, Any]) -> None:
    """A row that leads to no samples is a ValueError."""
    for name in REQUIRED:
        if row[name] is None:
            raise ValueError(f"has no {name}")
    if row["start"] < 0 or not 0 <= row["num_samples"] <= MOST_SAMPLES or row["sample_rate"] < 1:
        raise ValueError(
            f"{row['num_samples']} samples from {row['start']} on at {row['sample_rate']} Hz are not possible"
        )


def write_manifest(
    folder: str | Path,
    rows: Iterable[dict[str, Any]],
    config: dict[str, Any],
    parents: dict[str, str],
    quarantine: list[dict[str, Any]] | None = None,
    root: str = "/",
    **extra: Any,
) -> str:
    """Write and commit a manifest of `rows` (dicts by column; unknown ones may be left out), a row group at a
    time.

    `phones` and `words` are (start, end, name) triples; `quarantine` rows say id, path and reason. Paths
    below `root` are stored relative to it, so that the fingerprint, which this returns, does not change when
    a corpus moves. `extra` goes into meta.json.
    """
    root, rows = os.path.abspath(root), iter(rows)

    def tables() -> Iterator[pa.Table]:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            stored = [{**row, "path": _below(os.path.abspath(row["path"]), root)} for row in group]
            yield pa.Table.from_pylist(stored, schema=SCHEMA)

    return _write(Path(folder), tables(), config, parents, quarantine or [], root, **extra)


def copy_manifest(
    folder: str | Path, manifest: Manifest, config: dict[str, Any], parents: dict[str, str], **extra: Any
) -> str:
    """Write and commit the rows of `manifest`, a split or a `take` of another, as a manifest of its own, in
    the order of the file.

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
    folder: Path,
    tables: Iterable[pa.Table],
    config: dict[str, Any],
    parents: dict[str, str],
    quarantine: list[dict[str, Any]],
    root: str,
    **extra: Any,
) -> str:
    """A manifest of `tables`, each a row group."""
    hashes: list[np.ndarray] = []
    seconds = 0.0
    with (
        atomic_path(folder / "manifest.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA, write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table)
            hashes.append(np.array([hash(name) for name in table["id"].to_pylist()]))
            seconds += float((table["num_samples"].to_numpy() / table["sample_rate"].to_numpy()).sum())
    count = sum(map(len, hashes))
    # Sixty-four bits of each id instead of ten million strings: two ids agree by chance once in 400,000 such
    # manifests.
    assert count == 0 or len(np.unique(np.concatenate(hashes))) == count, "ids are unique"
    with atomic_path(folder / "quarantine.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine), encoding="utf-8"
        )
    return commit(
        folder,
        "manifest",
        config,
        parents,
        ["manifest.parquet"],
        root=root,
        num_utterances=count,
        hours=seconds / 3600,
        num_quarantined=len(quarantine),
        footer=hash_footer(folder / "manifest.parquet"),
        **extra,
    )


def _below(path: str, root: str) -> str:
    return path.removeprefix(os.path.join(root, ""))
