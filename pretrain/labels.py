"""Labels: one class per frame and codebook level for every utterance of a corpus.

A folder of shards. `shard_00000.npy` holds the labels of its utterances end to end, uint16, (frames,) or (frames, levels);
`shard_00000.parquet` names them (`id`, `num_frames`) and is written after the array, so that a shard exists when its table
does. `meta.json` comes when every shard stands. `pretrain` owns the format because HuBERT reads it; `quantize` writes it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.artefact import atomic_path, commit, read_meta

MAX_CLASSES = 2**16


def shard_stands(folder: Path, shard: int) -> bool:
    """Whether a shard is committed."""
    return (folder / f"shard_{shard:05d}.parquet").is_file()


def write_shard(folder: Path, shard: int, ids: list[str], labels: list[np.ndarray]) -> None:
    """Commit one shard atomically. `labels[i]` is (frames,) or (frames, levels) with values in [0, 65535]."""
    assert len(ids) == len(labels) > 0
    stem = folder / f"shard_{shard:05d}"
    array = np.concatenate(labels)
    assert array.size == 0 or 0 <= array.min() <= array.max() < MAX_CLASSES, "a search among NaN gives class -1"
    with atomic_path(stem.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, array.astype(np.uint16))
    with atomic_path(stem.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.table({"id": ids, "num_frames": [len(label) for label in labels]}), temporary)


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
    expected_ids: set[str] | None = None,
) -> str:
    """Declare the labels complete. Verifies that every shard stands and the ids are exactly `expected_ids`, each once."""
    ids: list[str] = []
    for shard in range(num_shards):
        if not shard_stands(folder, shard):
            raise ValueError(f"{folder}: shard {shard} of {num_shards} is missing")
        table, array = _read_shard(folder, shard)
        ids += table["id"].to_pylist()
        if (levels := 1 if array.ndim == 1 else array.shape[1]) != num_levels:
            raise ValueError(f"{folder}: shard {shard} has {levels} levels, not {num_levels}")
        if array.size and (highest := int(array.max())) >= num_classes:
            raise ValueError(f"{folder}: label {highest} of shard {shard} is beyond the codebook's {num_classes} classes")
    if len(set(ids)) != len(ids) or (expected_ids is not None and set(ids) != expected_ids):
        raise ValueError(f"{folder}: the shards hold {len(set(ids))} distinct of {len(ids)} utterances, not exactly what was asked")
    files = [f"shard_{shard:05d}{suffix}" for shard in range(num_shards) for suffix in (".npy", ".parquet")]
    return commit(
        folder, "labels", config, parents, files,
        codebook=codebook, num_classes=num_classes, num_levels=num_levels, frame_rate_hz=frame_rate_hz, num_shards=num_shards,
    )  # fmt: skip


class Labels:
    """Read access by utterance id, memory-mapped.

    >>> labels = Labels("runs/demo/labels1")  # doctest: +SKIP
    >>> labels["george-7"]                    # uint16 (frames,) or (frames, levels)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "labels")
        self.fingerprint: str = self.meta["fingerprint"]
        self.codebook: str = self.meta["codebook"]
        self.num_classes: int = self.meta["num_classes"]
        self.num_levels: int = self.meta["num_levels"]
        self.frame_rate_hz: float = self.meta["frame_rate_hz"]
        self._arrays: list[np.ndarray] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        for shard in range(self.meta["num_shards"]):
            table, array = _read_shard(self.folder, shard)
            counts = table["num_frames"].to_numpy()
            ends = np.cumsum(counts)
            for name, end, count in zip(table["id"].to_pylist(), ends.tolist(), counts.tolist(), strict=True):
                self._places[name] = (shard, end - count, end)
            self._arrays.append(array)

    def __getitem__(self, utterance: str) -> np.ndarray:
        shard, start, end = self._place(utterance)
        return np.asarray(self._arrays[shard][start:end])

    def __contains__(self, utterance: object) -> bool:
        return utterance in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> list[str]:
        """Utterance ids in the order they were written."""
        return list(self._places)

    def num_frames(self, utterance: str) -> int:
        _, start, end = self._place(utterance)
        return end - start

    def _place(self, utterance: str) -> tuple[int, int, int]:
        if utterance not in self._places:
            raise ValueError(f"{self.folder}: no labels for utterance {utterance!r}")
        return self._places[utterance]


def _read_shard(folder: Path, shard: int) -> tuple[pa.Table, np.ndarray]:
    """Table and memory-mapped array of one shard; missing or damaged files and lengths that disagree are a ValueError."""
    stem = folder / f"shard_{shard:05d}"
    try:
        table = pq.read_table(stem.with_suffix(".parquet"))
        array = np.load(stem.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{stem}.npy or .parquet: missing or damaged ({error})") from None
    if (frames := int(table["num_frames"].to_numpy().sum())) != len(array):
        raise ValueError(f"{stem}.npy: {len(array)} frames where the index has {frames}")
    return table, array
