"""Shards of labels: an array of the labels of some utterances end to end, and a table of their ids and
numbers of frames.

`shard_00000.npy` is uint16, (frames,) or (frames, levels). `shard_00000.parquet` has the columns `id` and
`num_frames`, and the SHA-256 of the array in its metadata. The table is written last, so a shard is complete
when its table exists.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.store.arrays import CheckedNpy, damaged, map_npy
from pretrain.store.disk import atomic_path
from pretrain.store.hashes import sha256_file

MAX_CLASSES = 2**16
SHARD_SCHEMA = pa.schema([("id", pa.string()), ("num_frames", pa.int64())])
SHA256_KEY = b"npy_sha256"  # in a table's metadata
id_hash = hash  # of ids, 64 bits; keyed anew in every process, so only for use within one


def shard_stands(folder: Path, shard: int) -> bool:
    """Whether a shard is committed."""
    return (folder / f"shard_{shard:05d}.parquet").is_file()


def write_shard(folder: Path, shard: int, ids: list[str], labels: list[np.ndarray]) -> None:
    """Commit one shard atomically. `labels[i]` is (frames,) or (frames, levels) with values in [0, 65535]."""
    assert len(ids) == len(labels) > 0
    stem = folder / f"shard_{shard:05d}"
    array = np.concatenate(labels)
    assert array.size == 0 or 0 <= array.min() <= array.max() < MAX_CLASSES, (
        "a search among NaN gives class -1"
    )
    with (
        atomic_path(stem.with_suffix(".npy"), 128 + 2 * array.size) as temporary,
        open(temporary, "wb") as file,
    ):
        np.save(file, array.astype(np.uint16))
    table = pa.table({"id": ids, "num_frames": [len(label) for label in labels]}, SHARD_SCHEMA)
    table = table.replace_schema_metadata({SHA256_KEY: sha256_file(stem.with_suffix(".npy"))})
    with atomic_path(stem.with_suffix(".parquet")) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def shard_fault(
    folder: Path,
    shard: int,
    ids: Iterable[str] | pa.ChunkedArray | np.ndarray,
    num_frames: np.ndarray,
    num_levels: int = 1,
) -> str | None:
    """Returns why a committed shard is not the labels of these utterances, in this order and with these
    numbers of frames, or None.

    `ids` may be their `id_hashes`. An array that differs from the one written is such a reason.
    """
    stem = f"{folder}/shard_{shard:05d}"
    try:
        table, array = read_shard(folder, shard)
    except ValueError as error:
        return str(error)
    if not np.array_equal(id_hashes(table["id"]), ids if isinstance(ids, np.ndarray) else id_hashes(ids)):
        return f"{stem}.parquet: names other utterances than this shard has"
    if not np.array_equal(table["num_frames"].to_numpy(), num_frames):
        return f"{stem}.parquet: other numbers of frames than the utterances have"
    if count_levels(array) != num_levels:
        return f"{stem}.npy: {count_levels(array)} levels, not {num_levels}"
    if written_hash(table) not in (None, sha256_file(Path(f"{stem}.npy"))):
        return f"{stem}.npy: damaged, not the labels that were written"
    return None


def id_chunks(ids: Iterable[str] | pa.ChunkedArray) -> Iterator[pa.StringArray]:
    """Some ten thousand ids at a time."""
    whole = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(list(ids), pa.string())])
    return (whole[first : first + 65536].combine_chunks() for first in range(0, len(whole), 65536))


def id_hashes(ids: Iterable[str] | pa.ChunkedArray | pa.StringArray) -> np.ndarray:
    """Of each id, (ids,) int64; comparable within one process."""
    if isinstance(ids, pa.StringArray):
        return np.fromiter(map(id_hash, ids.to_pylist()), np.int64, len(ids))
    return np.concatenate([np.empty(0, np.int64), *map(id_hashes, id_chunks(ids))])


def read_shard(folder: Path, shard: int) -> tuple[pa.Table, np.ndarray]:
    """Table and memory-mapped array of one shard; missing or damaged files and lengths that disagree are a
    ValueError."""
    stem = folder / f"shard_{shard:05d}"
    try:
        table = pq.read_table(stem.with_suffix(".parquet"), page_checksum_verification=True)
        array = map_npy(stem.with_suffix(".npy"))
        counts = table["num_frames"].to_numpy() if table.schema.equals(SHARD_SCHEMA) else None
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{stem}.npy or .parquet: missing or damaged ({error})") from None
    if counts is None or array.dtype != np.uint16 or array.ndim not in (1, 2):
        raise ValueError(f"{stem}.npy or .parquet: not a shard of labels")
    if (frames := int(counts.sum())) != len(array):
        raise ValueError(f"{stem}.npy: {len(array)} frames where the index has {frames}")
    return table, array


def finished_shards(folder: Path, meta: dict[str, Any]) -> Iterator[tuple[pa.Table, CheckedNpy]]:
    """Table and array of each shard of finished labels: the table is as it was written, the array is compared
    when it is read."""
    for shard in range(meta["num_shards"]):
        path = folder / f"shard_{shard:05d}.npy"
        index = path.with_suffix(".parquet")
        if index.is_file() and sha256_file(index) != meta["files"][index.name]:
            raise damaged(index)
        table, array = read_shard(folder, shard)
        yield table, CheckedNpy(path, array, [meta["files"][path.name]])


def written_hash(table: pa.Table) -> str | None:
    """SHA-256 of the array that the table was written for; shards of older versions do not have it."""
    found = (table.schema.metadata or {}).get(SHA256_KEY)
    return None if found is None else found.decode(errors="replace")


def count_levels(array: np.ndarray) -> int:
    """Codebook levels of an array of labels, (frames,) or (frames, levels)."""
    return 1 if array.ndim == 1 else int(array.shape[1])
