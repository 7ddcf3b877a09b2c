"""Unit corpora: the packed, memory-mapped documents that language models train on. The verb `pack`
(units/packing.py) makes one.

A document is an utterance. The folder holds, over all documents end to end and in the order they came:

`tokens.npy`         (tokens,), with several streams (tokens, streams): symbols of the vocabulary, uint16, or
                     uint32 if needed
`offsets.npy`        (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
`durations.npy`      (units,) uint16: frames that each unit lasts; all 1 without deduplication; no file if
                     unknown
`unit_offsets.npy`   (documents + 1,) int64, with unit BPE: the place of the durations of document i,
                     otherwise that of its tokens
`documents.parquet`  a row per document: `id`, `split` (or null), `num_frames` (or null)

`meta.json` adds `vocabulary` (units/corpus/vocabulary.py), `codebook` (fingerprint), `frame_rate_hz`,
`deduplicated`, `timed` and counts. BOS, EOS and padding are not stored: `Sequences` adds them as a pattern
(units/corpus/patterns.py) has them.

A damaged document is never read: `offsets.npy`, `unit_offsets.npy` and `documents.parquet` are compared with
their SHA-256 when the corpus is opened, tokens and durations in blocks of 16 MiB (`blocks` in `meta.json`)
when a block is first read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.store.arrays import CheckedNpy, damaged, map_npy
from pretrain.store.artefact import read_meta, require_as_written
from pretrain.store.hashes import BLOCK_BYTES, sha256_file
from units.corpus.sequence import expand
from units.corpus.vocabulary import Vocabulary


class UnitCorpus:
    """Read access to a unit corpus, memory-mapped; documents are numbered in stored order.

    >>> corpus = UnitCorpus("runs/demo/units")                 # doctest: +SKIP
    >>> for i in corpus.documents("test"):                     # doctest: +SKIP
    ...     corpus.ids[i], corpus.units(i), corpus.durations(i), corpus.frames(i)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "units")
        if "vocabulary" not in self.meta:
            raise ValueError(f"{folder}: packed by an older wordless; pack its labels again")
        require_as_written(folder, self.meta)
        self.fingerprint: str = self.meta["fingerprint"]
        self.codebook: str = self.meta["codebook"]
        self.vocabulary = Vocabulary.read(self.meta["vocabulary"])
        self.num_units, self.num_levels = self.vocabulary.num_units, self.vocabulary.num_levels
        self.frame_rate_hz: float = self.meta["frame_rate_hz"]
        self.deduplicated: bool = self.meta["deduplicated"]
        self.timed: bool = self.meta["timed"]
        self.offsets: np.ndarray = self._whole("offsets.npy")
        self._unit_offsets = self._whole("unit_offsets.npy") if self.vocabulary.merges else self.offsets
        self._table: pa.Table = self._whole("documents.parquet")
        self.num_frames: np.ndarray = self._table["num_frames"].fill_null(0).to_numpy()
        self._tokens = self._mapped("tokens.npy")
        count = len(self._table)
        whole = len(self._tokens) == self.offsets[-1]
        whole = whole and len(self.offsets) == len(self._unit_offsets) == count + 1
        if self.timed:
            self._durations = self._mapped("durations.npy")
            whole = whole and len(self._durations) == self._unit_offsets[-1]
        if not whole:
            raise ValueError(f"{folder}: its arrays differ in length; the files are not of one corpus")

    def _whole(self, name: str) -> Any:
        """A file that is read at once, as it was written."""
        path = self.folder / name
        if path.is_file() and sha256_file(path) != self.meta["files"][name]:
            raise damaged(path)
        with _named(path):
            return pq.read_table(path) if path.suffix == ".parquet" else np.load(path, allow_pickle=False)

    def _mapped(self, name: str) -> CheckedNpy:
        path = self.folder / name
        hashes = self.meta.get("blocks", {}).get(name, ())  # none: packed by an older version
        return CheckedNpy(path, map_npy(path), hashes, BLOCK_BYTES)

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def ids(self) -> list[str]:
        return list(self._table["id"].to_pylist())

    @cached_property
    def splits(self) -> list[str | None]:
        return list(self._table["split"].to_pylist())

    @property
    def num_streams(self) -> int:
        return len(self.vocabulary.sizes)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document, int64 (documents,)."""
        return np.diff(self.offsets)

    @property
    def num_units_of(self) -> np.ndarray:
        """Units per document, merges undone, int64 (documents,)."""
        return np.diff(self._unit_offsets)

    def documents(self, split: str | None = None) -> np.ndarray:
        """Numbers of the documents of one split (None: all). ValueError naming the known splits if there are
        none."""
        if split is None:
            return np.arange(len(self))
        chosen = np.flatnonzero(pc.equal(self._table["split"], split).fill_null(False).to_numpy())
        if not len(chosen):
            known = ", ".join(sorted(pc.unique(self._table["split"].drop_null()).to_pylist())) or "none"
            raise ValueError(f"{self.folder}: no documents in split {split!r}; its splits: {known}")
        return chosen

    def has_split(self, split: str | None) -> bool:
        return split is None or bool(pc.any(pc.equal(self._table["split"], split)).as_py())

    def index(self, document: str) -> int:
        found: int = pc.index(self._table["id"], document).as_py()
        if found < 0:
            raise ValueError(f"{self.folder}: no document {document!r}")
        return found

    def tokens(self, i: int) -> np.ndarray:
        """What a language model reads of document i, (tokens,) or (tokens, streams)."""
        return np.asarray(self._tokens.read(self.offsets[i], self.offsets[i + 1]))

    def units(self, i: int) -> np.ndarray:
        """Document i with merges undone: (units,), of several streams (units, streams)."""
        return self.vocabulary.expand(self.tokens(i))

    def durations(self, i: int) -> np.ndarray:
        """Frames that each unit of document i lasts, uint16 (units,). Raises ValueError if unknown."""
        self._require_timed()
        return np.asarray(self._durations.read(self._unit_offsets[i], self._unit_offsets[i + 1]))

    def frames(self, i: int) -> np.ndarray:
        """The labels per frame that document i was packed from, exactly: (frames,) or (frames, levels).

        ValueError where durations are not known or text took the place of units.
        """
        if self.vocabulary.layout == "interleaved":
            raise ValueError(
                f"{self.folder}: text has taken the place of some units; pack the labels without text"
            )
        return expand(self.units(i), self.durations(i))

    def _require_timed(self) -> None:
        if not self.timed:
            raise ValueError(
                f"{self.folder}: has no durations of units; it was packed from units without them"
            )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A file that cannot be read is a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}: missing or damaged ({error}); restore it, or remove {path.parent} and pack it again"
        ) from None


# Writing
