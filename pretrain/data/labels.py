"""Labels: one class per frame and codebook level for every utterance of a corpus.

A folder of shards (see `pretrain.data.label_shards`) and `meta.json`, which is written when all shards are
complete. `pretrain` owns the format because HuBERT reads it; `quantize` writes it.

Damage is detected before a label is used: a table is compared with its SHA-256 in `meta.json` when it is
opened, an array when its first label is read (0.7 s per GB, once per process).

Labels are read at 50 Hz. Of labels declared as 100 Hz (`frame_rate_hz`) every second one is used: the Kaldi
frame 2t of 10 ms has the 400-sample window of the encoder's frame t.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pretrain.data.frame_counts import differing
from pretrain.data.label_shards import (
    count_levels,
    finished_shards,
    id_chunks,
    id_hash,
    id_hashes,
    read_shard,
    shard_stands,
    written_hash,
)
from pretrain.store.artefact import commit, read_meta, require_as_written
from pretrain.store.hashes import sha256_file


def commit_labels(
    folder: Path,
    num_shards: int,
    config: dict[str, Any],
    parents: dict[str, str],
    *,
    codebook: str,
    num_classes: int,
    num_levels: int = 1,
    frame_rate_hz: float = 50.0,
    expected_ids: Iterable[str] | pa.ChunkedArray | None = None,
    expected_frames: np.ndarray | None = None,
) -> str:
    """Declare the labels complete. Checks that every shard exists, that the ids are exactly `expected_ids`,
    each once, and that each has its `expected_frames` (in the order of those ids). Doing so twice, or two at
    once, does no harm."""
    hashes, frames = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    files: dict[str, str] = {}
    for shard in range(num_shards):
        if not shard_stands(folder, shard):
            raise ValueError(f"{folder}: shard {shard} of {num_shards} is missing")
        table, array = read_shard(folder, shard)
        hashes.append(id_hashes(table["id"]))
        frames.append(table["num_frames"].to_numpy())
        if (levels := count_levels(array)) != num_levels:
            raise ValueError(f"{folder}: shard {shard} has {levels} levels, not {num_levels}")
        if array.size and (highest := int(array.max())) >= num_classes:
            raise ValueError(
                f"{folder}: label {highest} of shard {shard} is beyond the codebook's {num_classes} classes; "
                f"remove shard_{shard:05d}.npy and .parquet, and run the command again"
            )
        names = [f"shard_{shard:05d}{suffix}" for suffix in (".npy", ".parquet")]
        files |= {name: sha256_file(folder / name) for name in names}
        if written_hash(table) not in (None, files[names[0]]):
            raise ValueError(
                f"{folder}/{names[0]}: damaged, not the labels that were written; remove it and {names[1]}, "
                "and run the command again"
            )
    _require_exactly(
        folder, num_shards, np.concatenate(hashes), np.concatenate(frames), expected_ids, expected_frames
    )
    return commit(
        folder,
        "labels",
        config,
        parents,
        files,
        codebook=codebook,
        num_classes=num_classes,
        num_levels=num_levels,
        frame_rate_hz=frame_rate_hz,
        num_shards=num_shards,
    )


def _require_exactly(
    folder: Path,
    num_shards: int,
    found: np.ndarray,
    frames: np.ndarray,
    expected_ids: Iterable[str] | pa.ChunkedArray | None,
    expected_frames: np.ndarray | None,
) -> None:
    """Hashes `found` (rows,) of the ids in the shards are those expected, each once, with their frames; a
    ValueError names what is not.

    Sixty-four bits of each id take the place of ten million strings.
    """
    asked: Any = expected_ids
    if asked is not None and not isinstance(asked, pa.ChunkedArray):
        asked = pa.chunked_array([pa.array(list(asked), pa.string())])
    order = np.argsort(found)
    ordered = found[order]
    expected = ordered if asked is None else id_hashes(asked)
    expected_order = np.argsort(expected)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice) or not np.array_equal(ordered, expected[expected_order]):
        tables = [read_shard(folder, shard)[0]["id"] for shard in range(num_shards)]
        missing, foreign = np.setdiff1d(expected, ordered), np.setdiff1d(ordered, expected)
        problems = [
            f"{_name_of(some[0], ids)!r}{f' and {len(some) - 1} more' if len(some) > 1 else ''} {what}"
            for what, some, ids in (
                ("more than once", twice, tables),
                ("missing", missing, [asked]),
                ("not asked for", foreign, tables),
            )
            if len(some)
        ]
        raise ValueError(
            f"{folder}: the shards hold {len(np.unique(found))} distinct of {len(found)} utterances, not "
            f"exactly what was asked: {'; '.join(problems)}; write the labels again"
        )
    if expected_frames is not None and len(
        wrong := np.flatnonzero(frames[order] != expected_frames[expected_order])
    ):
        row = int(expected_order[wrong[0]])
        raise ValueError(
            f"{folder}: {frames[order[wrong[0]]]} labels for utterance {asked[row].as_py()!r}, which has "
            f"{expected_frames[row]} frames ({len(wrong)} of {len(found)} utterances differ); write the "
            "labels again"
        )


class Labels:
    """Read access by utterance id, memory-mapped; at 50 Hz, whatever the rate in the files.

    >>> labels = Labels("runs/demo/labels1")  # doctest: +SKIP
    >>> labels["george-7"]                    # uint16 (frames,) or (frames, levels)  # doctest: +SKIP
    """

    frame_rate_hz = 50.0

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "labels")
        require_as_written(folder, self.meta)
        self.fingerprint: str = self.meta["fingerprint"]
        self.codebook: str = self.meta["codebook"]
        self.num_classes: int = self.meta["num_classes"]
        self.num_levels: int = self.meta["num_levels"]
        if (stored_rate := self.meta["frame_rate_hz"]) not in (50, 100):
            raise ValueError(
                f"{folder}: labels at {stored_rate} Hz cannot be used; the encoder has 50 frames a second "
                "(100 can be halved)"
            )
        self._step = int(stored_rate) // 50
        shards = list(finished_shards(self.folder, self.meta))
        self._arrays = [array for _, array in shards]
        self._ids = pa.chunked_array([table["id"].combine_chunks() for table, _ in shards], pa.string())
        self._ends = np.cumsum([len(table) for table, _ in shards])  # rows up to the end of each shard
        counts = [table["num_frames"].to_numpy() for table, _ in shards]
        starts = [np.cumsum(count) - count for count in counts]
        none = np.empty(0, np.int64)
        self._counts = np.concatenate([none, *counts])  # frames of each row, at the stored rate
        self._starts = np.concatenate([none, *starts])  # the first frame of each row, in its shard

    def __getitem__(self, utterance: str) -> np.ndarray:
        row = self._row(utterance)
        array = self._arrays[int(np.searchsorted(self._ends, row, side="right"))]
        return np.asarray(array.read(self._starts[row], self._starts[row] + self._counts[row])[:: self._step])

    def first_level(self, utterance: str) -> np.ndarray:
        """Labels of level 0, uint16 (frames,): those of the plain codebook, for whatever takes one stream of
        units."""
        labels = self[utterance]
        return labels if labels.ndim == 1 else labels[:, 0]

    def __contains__(self, utterance: object) -> bool:
        return isinstance(utterance, str) and self._find(utterance) >= 0

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def ids(self) -> list[str]:
        """Utterance ids in the order they were written."""
        return list(self._ids.to_pylist())

    def num_frames(self, utterance: str) -> int:
        return -(-int(self._counts[self._row(utterance)]) // self._step)

    def frame_counts(self, ids: Iterable[str] | pa.ChunkedArray) -> np.ndarray:
        """Labels of each of many utterances, (ids,) int64. One that has none is a ValueError that names
        it."""
        counts = []
        for chunk in id_chunks(ids):
            rows = self._find_many(chunk)
            if (rows < 0).any():
                raise self._missing(chunk[int(np.argmin(rows))].as_py())
            counts.append(-(-self._counts[rows] // self._step))
        return np.concatenate([np.empty(0, np.int64), *counts])

    def require_frames(self, ids: Iterable[str] | pa.ChunkedArray, num_frames: np.ndarray) -> None:
        """Every utterance has as many labels as frames, give or take one, or a ValueError names one that has
        not."""
        ids = pa.chunked_array(list(id_chunks(ids)), pa.string())
        have = self.frame_counts(ids)
        wrong = differing(have, num_frames)
        if not len(wrong):
            return
        share = have.sum() / max(1, num_frames.sum())
        hint = ""
        if self._step == 1 and 1.8 < share < 2.2:
            hint = (
                "; they look like 100 Hz labels: declare frame_rate_hz = 100 where they are written, and "
                "every second one is taken"
            )
        elif self._step == 2 and 0.45 < share < 0.55:
            hint = (
                "; they are declared as 100 Hz and look like 50: correct frame_rate_hz where they are written"
            )
        first = int(wrong[0])
        raise ValueError(
            f"{self.folder}: {have[first]} labels for utterance {ids[first].as_py()!r}, which has "
            f"{num_frames[first]} frames of 20 ms"
            f" ({len(wrong)} of {len(have)} utterances differ by more than one){hint}"
        )

    def _row(self, utterance: str) -> int:
        if (row := self._find(utterance)) < 0:
            raise self._missing(utterance)
        return row

    def _missing(self, utterance: str) -> ValueError:
        return ValueError(f"{self.folder}: no labels for utterance {utterance!r}")

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all ids in ascending order, and the row of each: 16 bytes an utterance where a dict takes
        300."""
        hashes = id_hashes(self._ids)
        order = np.argsort(hashes)
        return hashes[order], order

    def _find(self, utterance: str) -> int:
        """Row of an utterance, -1 if it has none."""
        hashes, order = self._index
        first, last = (
            int(np.searchsorted(hashes, np.int64(id_hash(utterance)), side=side))
            for side in ("left", "right")
        )
        return next((int(row) for row in order[first:last] if self._ids[int(row)].as_py() == utterance), -1)

    def _find_many(self, ids: pa.StringArray) -> np.ndarray:
        hashes, order = self._index
        if not len(hashes):
            return np.full(len(ids), -1)
        rows = order[np.minimum(np.searchsorted(hashes, id_hashes(ids)), len(hashes) - 1)]
        shards = np.searchsorted(self._ends, rows, side="right")
        same = np.zeros(len(ids), bool)
        for shard in np.unique(shards).tolist():  # taking from the chunked array would copy all of it
            here = np.flatnonzero(shards == shard)
            names = self._ids.chunk(shard).take(
                pa.array(rows[here] - (self._ends[shard - 1] if shard else 0))
            )
            same[here] = pc.equal(names, ids.take(pa.array(here))).to_numpy(zero_copy_only=False)
        for other in np.flatnonzero(~same):  # two ids of one hash, or no labels
            rows[other] = self._find(ids[int(other)].as_py())
        return rows


def count_classes(folder: str | Path) -> np.ndarray:
    """Frames (50 a second) by class at each level of finished labels, (levels, K) int64; a shard at a time is
    in memory."""
    meta = read_meta(folder, "labels")
    require_as_written(folder, meta)
    counts, step = (
        np.zeros((meta["num_levels"], meta["num_classes"]), np.int64),
        int(meta["frame_rate_hz"]) // 50,
    )
    for table, checked in finished_shards(Path(folder), meta):
        array = checked.read(0, len(checked))
        if step > 1:  # of each utterance the frames 0, step, 2 step …
            lengths = table["num_frames"].to_numpy()
            places = np.arange(len(array)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            array = array[places % step == 0]
        for level, classes in enumerate(array.reshape(len(array), -1).T):
            counts[level] += np.bincount(classes, minlength=counts.shape[1])
    return counts


def _name_of(wanted: int, ids: Iterable[pa.ChunkedArray]) -> str:
    """The id that has this hash."""
    return next(name for column in ids for name in column.to_pylist() if id_hash(name) == wanted)
