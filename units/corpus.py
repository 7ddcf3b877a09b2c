"""Unit corpora: the packed, memory-mapped documents that language models train on. The verb `pack` makes one from labels.

A document is an utterance. The folder holds, over all documents end to end and in the manifest's order:

`tokens.npy`         (tokens,) uint16: units 0 .. K-1 (uint32 when K + 2 exceeds 65536)
`durations.npy`      (tokens,) uint16: how many frames each unit lasts; all 1 without deduplication
`offsets.npy`        (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
`documents.parquet`  a row per document: `id`, `split` (or null), `num_frames`

`meta.json` adds `num_units` (K), `frame_rate_hz`, `deduplicated`, `codebook` (fingerprint) and counts. The vocabulary is the K
units, then BOS = K and EOS = K + 1; these two mark document boundaries in a model's input and are not stored.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.artefact import atomic_path, commit, read_meta, require_absent
from pretrain.audio import num_frames
from pretrain.config import Config
from pretrain.labels import Labels
from pretrain.manifest import Manifest
from pretrain.progress import progress
from units.sequence import deduplicate, expand


class PackConfig(Config):
    """Labels of the manifest's utterances to a unit corpus; splits come from the manifest."""

    manifest: str
    labels: str
    out: str
    deduplicate: bool = True


class Document(NamedTuple):
    """One document to be packed: its labels per frame, (frames,)."""

    id: str
    split: str | None
    frames: np.ndarray


def pack(config: PackConfig) -> dict[str, Any]:
    """Write the unit corpus of a manifest's utterances, of labels with several levels level 0.

    Errors name the utterance: absent from the labels, or of another length.
    """
    require_absent(config.out)
    manifest, labels = Manifest(config.manifest), Labels(config.labels)
    missing = [name for name in manifest.ids if name not in labels]
    if missing:
        raise ValueError(
            f"{config.labels}: no labels for {len(missing)} of the {len(manifest)} utterances of {config.manifest}, "
            f"first {missing[0]!r}; encode this manifest, or pack the manifest that was encoded"
        )

    def documents() -> Iterator[Document]:
        with progress("pack", len(manifest), "utterance") as advance:
            for name, split, length in zip(
                manifest.ids, manifest.column("split").to_pylist(), manifest.lengths.tolist(), strict=True
            ):
                frames = labels.first_level(name)
                if len(frames) != num_frames(length):
                    raise ValueError(
                        f"{config.labels}: {len(frames)} labels for utterance {name!r}, which has {num_frames(length)} frames "
                        f"in {config.manifest}; were these labels made from other audio?"
                    )
                yield Document(name, split, frames)
                advance(1)

    summary = write_corpus(
        config.out, documents(), config.resolved(), {"manifest": manifest.fingerprint, "labels": labels.fingerprint},
        num_units=labels.num_classes, codebook=labels.codebook, frame_rate_hz=labels.frame_rate_hz, deduplicated=config.deduplicate,
    )  # fmt: skip
    if labels.num_levels == 1:
        return summary
    note = f"labels: {config.labels} has {labels.num_levels} levels; level 0 is packed, the plain codebook's units"
    return {**summary, "notes": [note]}


def write_corpus(
    folder: str | Path,
    documents: Iterable[Document],
    config: dict[str, Any],
    parents: dict[str, str],
    *,
    num_units: int,
    codebook: str,
    frame_rate_hz: float,
    deduplicated: bool,
) -> dict[str, Any]:
    """Write the artefact from a stream of documents, holding one document at a time; returns the counts.

    Errors: ValueError naming an empty document, a repeated id, or a label outside 0 .. num_units-1.
    """
    folder = Path(folder)
    dtype = np.dtype("<u2" if num_units + 2 <= 2**16 else "<u4")
    offsets, seen, rows, total_frames = [0], set[str](), list[tuple[str, str | None, int]](), 0
    with (
        _growing_npy(folder / "tokens.npy", dtype) as tokens,
        _growing_npy(folder / "durations.npy", np.dtype("<u2")) as durations,
    ):
        for row, document in enumerate(documents):
            frames = document.frames
            if not len(frames):
                raise ValueError(f"{folder}: row {row}, document {document.id!r}, is empty; leave it out")
            if document.id in seen:
                raise ValueError(f"{folder}: row {row}: a second document with the id {document.id!r}")
            if frames.max() >= num_units or frames.min() < 0:
                wrong = int(frames.max() if frames.max() >= num_units else frames.min())
                raise ValueError(
                    f"{folder}: document {document.id!r} has the unit {wrong}; the codebook {codebook} has 0 .. {num_units - 1}"
                )
            seen.add(document.id)
            units, lengths = deduplicate(frames) if deduplicated else (frames, np.ones(len(frames)))
            tokens.append(units)
            durations.append(lengths)
            offsets.append(tokens.count)
            rows.append((document.id, document.split, len(frames)))
            total_frames += len(frames)
        if not seen:
            raise ValueError(f"{folder}: there are no documents to pack")
    with atomic_path(folder / "offsets.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(offsets, np.int64))
    schema = pa.schema([("id", pa.string()), ("split", pa.string()), ("num_frames", pa.int64())])
    with atomic_path(folder / "documents.parquet") as temporary:
        pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=schema), temporary)
    counts = {"num_documents": len(seen), "num_tokens": tokens.count, "num_frames": total_frames, "num_units": num_units}
    described = {"codebook": codebook, "frame_rate_hz": frame_rate_hz, "deduplicated": deduplicated, **counts}
    commit(folder, "units", config, parents, ["tokens.npy", "durations.npy", "offsets.npy", "documents.parquet"], **described)
    return {
        **counts, "hours": total_frames / frame_rate_hz / 3600,
        "units_per_second": tokens.count / total_frames * frame_rate_hz, "frames_per_unit": total_frames / tokens.count,
    }  # fmt: skip


class UnitCorpus:
    """Read access to a unit corpus, memory-mapped; documents are numbered in stored order.

    >>> corpus = UnitCorpus("runs/demo/units")                 # doctest: +SKIP
    >>> for i in corpus.documents("test"):                     # doctest: +SKIP
    ...     corpus.ids[i], corpus.units(i), corpus.durations(i), corpus.frames(i)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "units")
        self.fingerprint: str = self.meta["fingerprint"]
        self.codebook: str = self.meta["codebook"]
        self.num_units: int = self.meta["num_units"]
        self.frame_rate_hz: float = self.meta["frame_rate_hz"]
        self.deduplicated: bool = self.meta["deduplicated"]
        self.offsets: np.ndarray = np.load(self.folder / "offsets.npy", allow_pickle=False)
        table = pq.read_table(self.folder / "documents.parquet")
        self.ids: list[str] = table["id"].to_pylist()
        self.splits: list[str | None] = table["split"].to_pylist()
        self.num_frames: np.ndarray = table["num_frames"].to_numpy()
        self._tokens = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self._durations = np.load(self.folder / "durations.npy", mmap_mode="r", allow_pickle=False)
        if not len(self._tokens) == len(self._durations) == self.offsets[-1] or len(self.ids) != len(self.offsets) - 1:
            raise ValueError(f"{folder}: its arrays differ in length; the files are not of one corpus")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bos(self) -> int:
        return self.num_units

    @property
    def eos(self) -> int:
        return self.num_units + 1

    @property
    def vocabulary_size(self) -> int:
        return self.num_units + 2

    @property
    def lengths(self) -> np.ndarray:
        """Units per document, int64 (documents,)."""
        return np.diff(self.offsets)

    def documents(self, split: str | None = None) -> np.ndarray:
        """Numbers of the documents of one split (None: all). ValueError naming the known splits if there are none."""
        if split is None:
            return np.arange(len(self))
        chosen = np.flatnonzero([name == split for name in self.splits])
        if not len(chosen):
            known = ", ".join(sorted({name for name in self.splits if name is not None})) or "none"
            raise ValueError(f"{self.folder}: no documents in split {split!r}; its splits: {known}")
        return chosen

    def index(self, document: str) -> int:
        try:
            return self.ids.index(document)
        except ValueError:
            raise ValueError(f"{self.folder}: no document {document!r}") from None

    def units(self, i: int) -> np.ndarray:
        """(units,) of document i."""
        return np.asarray(self._tokens[self.offsets[i] : self.offsets[i + 1]])

    def durations(self, i: int) -> np.ndarray:
        """Frames that each unit of document i lasts, uint16 (units,)."""
        return np.asarray(self._durations[self.offsets[i] : self.offsets[i + 1]])

    def frames(self, i: int) -> np.ndarray:
        """The labels per frame that document i was packed from, exactly: (frames,)."""
        return expand(self.units(i), self.durations(i))

    def sequence(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Symbols start .. stop of BOS, the units of document i, EOS: what language models read and predict; int64."""
        units = self.units(i)
        stop = len(units) + 2 if stop is None else stop
        bos = [self.bos] if start == 0 else []
        eos = [self.eos] if stop == len(units) + 2 else []
        return np.concatenate([bos, units[max(start - 1, 0) : stop - 1], eos]).astype(np.int64)


class Sequences(Sequence[np.ndarray]):
    """BOS, units, EOS of each of some documents, int64 (units + 2,), read when asked for."""

    def __init__(self, corpus: UnitCorpus, documents: np.ndarray):
        self.corpus, self.documents = corpus, documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: Any) -> Any:
        return self.corpus.sequence(self.documents[i])


class _GrowingNpy:
    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self.file, self.dtype, self.count = file, dtype, 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.count += len(values)

    def _write_header(self) -> int:
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()

    def finish(self) -> None:
        """Put the true length in the header: numpy pads headers so that the first axis can grow in place."""
        assert self._write_header() == 128


@contextmanager
def _growing_npy(path: Path, dtype: np.dtype) -> Iterator[_GrowingNpy]:
    """A `.npy` array of unknown length, written as it comes and visible when complete."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        array = _GrowingNpy(file, dtype)
        yield array
        array.finish()
