"""Unit corpora: the packed, memory-mapped documents that language models train on. The verb `pack` (units/packing.py) makes one.

A document is an utterance. The folder holds, over all documents end to end and in the order they came:

`tokens.npy`         (tokens,), with several streams (tokens, streams): symbols of the vocabulary, uint16 (uint32 where they need it)
`offsets.npy`        (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
`durations.npy`      (units,) uint16: how many frames each unit lasts; all 1 without deduplication; no such file if nobody knows
`unit_offsets.npy`   (documents + 1,) int64, with unit BPE: where the durations of document i lie; otherwise `offsets.npy` says it
`documents.parquet`  a row per document: `id`, `split` (or null), `num_frames` (null if nobody knows)

`meta.json` adds `vocabulary` (units/corpus/vocabulary.py), `codebook` (fingerprint), `frame_rate_hz`, `deduplicated`, `timed` and counts.
BOS, EOS and padding are not stored: `Sequences` adds them as a pattern (units/corpus/patterns.py) has them.

Nobody reads a damaged document: `offsets.npy`, `unit_offsets.npy` and `documents.parquet` are compared with their SHA-256 when
the corpus is opened, tokens and durations in blocks of 16 MiB (`blocks` in `meta.json`) when something of a block is read first.

Writing streams: what is in memory does not grow with the corpus (but 24 bytes a document). Every ten seconds the arrays in
`partial/` are made safe and it is recorded how far they reach, so that who was killed goes on from there, to the same bytes.
"""

import io
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.data.label_shards import id_hashes
from pretrain.store.arrays import CheckedNpy, damaged, map_npy
from pretrain.store.artefact import commit, keep_to_plan, read_meta, require_as_written
from pretrain.store.disk import DiskFull, atomic_path, make_folder, sync_folder, telling_full_disk, write_json
from pretrain.store.hashes import BLOCK_BYTES, sha256_blocks, sha256_file
from units.corpus.bpe import Merger
from units.corpus.patterns import Pattern
from units.corpus.sequence import MAX_DURATION, expand
from units.corpus.vocabulary import Vocabulary

RECORD_SECONDS = 10.0
MAPPED = ("tokens.npy", "durations.npy")
ROW_GROUP = 10_000
SCHEMA = pa.schema([("id", pa.string()), ("split", pa.string()), ("num_frames", pa.int64())])


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
        whole = (
            len(self._tokens) == self.offsets[-1]
            and len(self.offsets) == len(self._unit_offsets) == count + 1
        )
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
        """Numbers of the documents of one split (None: all). ValueError naming the known splits if there are none."""
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
        """Frames that each unit of document i lasts, uint16 (units,). ValueError if nobody knows."""
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
                f"{self.folder}: how long its units last is not known: what it was packed from did not say"
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


class DocumentSequences(Protocol):
    """Documents as a model reads them, BOS and EOS included: (steps,) int64 or (steps, streams)."""

    @property
    def lengths(self) -> np.ndarray:
        """Predicted steps of each, one fewer than its steps, int64 (documents,)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: Any) -> np.ndarray: ...
    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Steps start .. stop of document i."""


class Sequences(Sequence[np.ndarray]):
    """Some documents of a corpus, arranged by a pattern when they are asked for."""

    def __init__(self, corpus: UnitCorpus, documents: np.ndarray, pattern: Pattern):
        assert pattern.sizes == corpus.vocabulary.sizes
        self.corpus, self.documents, self.pattern = corpus, documents, pattern
        self.lengths: np.ndarray = pattern.length(corpus.lengths[documents]) - 1

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: Any) -> Any:
        return self.pattern.arrange(self.corpus.tokens(self.documents[i]))

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        if self.corpus.num_streams > 1:
            return self[i][start:stop]
        # A plain sequence is BOS, tokens, EOS: long documents are not read whole for each of their pieces.
        document, (size,) = self.documents[i], self.corpus.vocabulary.sizes
        stop = min(stop, int(self.lengths[i]) + 1)
        bos, eos = [size] if start == 0 else [], [size + 1] if stop == self.lengths[i] + 1 else []
        tokens = self.corpus.tokens(document)[max(start - 1, 0) : stop - 1]
        return np.concatenate([bos, tokens, eos]).astype(np.int64)


class ListedSequences(list[np.ndarray]):
    """Sequences in memory, BOS and EOS included."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) - 1 for sequence in self], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        return self[i][start:stop]


# Writing


class Document(NamedTuple):
    """One document to be packed: symbols before unit BPE, (n,) or (n, streams), and how many frames each lasts, (n,), if known."""

    id: str
    split: str | None
    units: np.ndarray
    durations: np.ndarray | None = None


Documents = Iterable[Document] | Callable[[int], Iterable[Document]]


def write_corpus(
    folder: str | Path,
    documents: Documents,
    config: dict[str, Any],
    parents: dict[str, str],
    *,
    vocabulary: Vocabulary,
    codebook: str,
    frame_rate_hz: float,
    deduplicated: bool,
    timed: bool = True,
) -> dict[str, Any]:
    """Write the artefact from a stream of documents, or from a function that gives those from number `first` on; returns the counts.

    Errors: ValueError naming an empty document, a repeated id, a symbol outside the vocabulary, durations that do not fit.
    """
    folder = Path(folder)
    partial = folder / "partial"
    described = {
        "codebook": codebook,
        "frame_rate_hz": frame_rate_hz,
        "deduplicated": deduplicated,
        "timed": timed,
    }
    plan = {
        "config": config,
        "parents": parents,
        "vocabulary": vocabulary.model_dump(mode="json"),
        **described,
    }
    files = ["tokens.npy", "offsets.npy", *(["durations.npy"] if timed else [])]
    files += ["unit_offsets.npy"] if vocabulary.merges else []
    make_folder(partial)
    keep_to_plan(partial, plan)
    for name in files:  # who was killed while `commit` hashed the files has moved them already
        if (folder / name).is_file() and not (partial / name).is_file():
            os.replace(folder / name, partial / name)
    try:
        counts = _write_arrays(partial, documents, vocabulary, codebook, timed)
        _write_documents(partial / "documents.jsonl", folder)
    except DiskFull:
        raise
    except ValueError:
        shutil.rmtree(partial)  # what is wrong must be changed, and then this is work on something else
        raise
    for name in files:
        os.replace(partial / name, folder / name)
    sync_folder(folder)
    numbers: dict[str, Any] = {**counts, "num_symbols": list(vocabulary.sizes)}
    hashes, blocks = {}, {}
    for name in [*files, "documents.parquet"]:
        hashes[name], blocks[name] = sha256_blocks(folder / name)
    commit(
        folder,
        "units",
        config,
        parents,
        hashes,
        vocabulary=vocabulary.model_dump(mode="json"),
        num_units=vocabulary.num_units,
        **described,
        **numbers,
        blocks={name: blocks[name] for name in MAPPED if name in blocks},
    )
    shutil.rmtree(partial)
    if timed:
        frames, tokens = counts["num_frames"], counts["num_tokens"]
        numbers |= {
            "hours": frames / frame_rate_hz / 3600,
            "tokens_per_second": tokens / frames * frame_rate_hz,
        }
        numbers |= {"frames_per_token": frames / tokens}
    return numbers


def _write_arrays(
    partial: Path, documents: Documents, vocabulary: Vocabulary, codebook: str, timed: bool
) -> dict[str, int]:
    """The arrays and `documents.jsonl`, from where an earlier call stopped."""
    sizes = vocabulary.sizes
    columns = () if len(sizes) == 1 else (len(sizes),)
    merger = Merger(vocabulary) if vocabulary.merges else None
    record = partial / "written.json"
    done: dict[str, Any] = {"rows": {}, "num_documents": 0, "num_frames": 0, "num_units": 0, "bytes": 0}
    done |= json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    stream = (
        documents(done["num_documents"])
        if callable(documents)
        else itertools.islice(documents, done["num_documents"], None)
    )
    with ExitStack() as stack:

        def array(name: str, dtype: str, columns: tuple[int, ...] = ()) -> GrowingNpy:
            return stack.enter_context(GrowingNpy(partial / name, dtype, columns, done["rows"].get(name, 0)))

        # Specials included: every pattern over these streams fits the type.
        tokens = array("tokens.npy", "<u2" if sum(sizes) + 3 * len(sizes) <= 2**16 else "<u4", columns)
        offsets = array("offsets.npy", "<i8")
        durations = array("durations.npy", "<u2") if timed else None
        unit_offsets = array("unit_offsets.npy", "<i8") if merger else None
        arrays = [grown for grown in (tokens, offsets, durations, unit_offsets) if grown is not None]
        names = stack.enter_context(GrowingFile(partial / "documents.jsonl", done["bytes"]))
        frames, count, units_seen = (int(done[key]) for key in ("num_frames", "num_documents", "num_units"))
        recorded = time.monotonic()
        if not count:
            for starts in (offsets, unit_offsets):
                if starts is not None:
                    starts.append(np.zeros(1))
        for document in stream:
            _require_sound(document, count, partial.parent, vocabulary, codebook, timed)
            lengths = document.durations
            if durations is not None and lengths is not None:
                durations.append(lengths)
            tokens.append(document.units if merger is None else merger.encode(document.units))
            offsets.append(np.array([tokens.count]))
            units_seen += len(document.units)
            if unit_offsets is not None:
                unit_offsets.append(np.array([units_seen]))
            lasting = None if lengths is None or not timed else int(lengths.sum(dtype=np.int64))
            names.write(json.dumps([document.id, document.split, lasting]).encode() + b"\n")
            frames, count = frames + (lasting or 0), count + 1
            if time.monotonic() - recorded >= RECORD_SECONDS:
                for growing in (*arrays, names):
                    growing.make_safe()
                rows = {grown.name: grown.count for grown in arrays}
                totals = {"num_documents": count, "num_frames": frames, "num_units": units_seen}
                write_json(record, {"rows": rows, **totals, "bytes": names.size})
                recorded = time.monotonic()
        if not count:
            raise ValueError(f"{partial.parent}: there are no documents to pack")
        names.make_safe()
        for grown in arrays:
            grown.finish()
        return {
            "num_documents": count,
            "num_tokens": tokens.count,
            "num_units_written": units_seen,
            "num_frames": frames,
        }


def _require_sound(
    document: Document, row: int, folder: Path, vocabulary: Vocabulary, codebook: str, timed: bool
) -> None:
    units, named = document.units, f"{folder}: row {row}, document {document.id!r}"
    streams = len(vocabulary.sizes)
    if units.shape != ((len(units),) if streams == 1 else (len(units), streams)):
        raise ValueError(
            f"{named}: its units have the shape {units.shape}; {streams} stream{'s' * (streams > 1)} of them go here"
        )
    if not len(units):
        raise ValueError(f"{named}, is empty; leave it out")
    limits = np.array([vocabulary.num_units if vocabulary.merges else size for size in vocabulary.sizes])
    wrong = (units < 0) | (units >= (limits if streams > 1 else limits[0]))
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        limit = limits[place[1] if streams > 1 else 0]
        level = f" in stream {place[1]}" if streams > 1 else ""
        raise ValueError(
            f"{folder}: document {document.id!r} has the unit {units[place]}{level}; the codebook {codebook} has 0 .. {limit - 1}"
        )
    if timed:
        if document.durations is None or document.durations.shape != (len(units),):
            have = "none" if document.durations is None else len(document.durations)
            raise ValueError(f"{named}: {len(units)} units, but {have} durations")
        if document.durations.min() < 0 or document.durations.max() > MAX_DURATION:
            raise ValueError(f"{named}: a duration is outside 0 .. {MAX_DURATION} frames")


def _write_documents(lines: Path, folder: Path) -> None:
    """`documents.parquet` from the JSON lines, a few at a time; an id that comes twice is a ValueError with its second row."""
    hashes = []
    with (
        atomic_path(folder / "documents.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA) as writer,
    ):
        for rows in _batches(lines):
            table = pa.table(
                [
                    pa.array(column, field.type)
                    for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)
                ],
                SCHEMA,
            )
            hashes.append(id_hashes(table["id"]))
            writer.write_table(table)
        merged = np.sort(np.concatenate(hashes))
        twice = set(merged[1:][merged[1:] == merged[:-1]].tolist())
        seen: set[str] = set()
        row = 0
        for rows, numbers in zip(_batches(lines), hashes, strict=True) if twice else ():
            for (name, _, _), number in zip(rows, numbers.tolist(), strict=True):
                if number in twice and name in seen:
                    raise ValueError(f"{folder}: row {row}: a second document with the id {name!r}")
                seen |= {name} if number in twice else set()
                row += 1


def _batches(lines: Path) -> Iterator[list[Any]]:
    with open(lines, "rb") as file:
        while rows := [json.loads(line) for line in itertools.islice(file, ROW_GROUP)]:
            yield rows


class GrowingFile:
    """A file written to its end. `size` bytes of an existing one are kept, what lies behind them is not. A full disk is a `DiskFull`."""

    def __init__(self, path: Path, size: int = 0):
        self.name, self.path, self.size = path.name, path, size
        with telling_full_disk(path, size):
            self._file = open(path, "r+b" if size else "wb")  # noqa: SIM115  # closed by __exit__
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def write(self, content: bytes) -> None:
        self.size += len(content)
        try:
            self._file.write(content)
        except OSError:
            with telling_full_disk(self.path, self.size):
                raise

    def make_safe(self) -> None:
        """All that was written is on the disk."""
        with telling_full_disk(self.path, self.size):
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with (
            nullcontext() if kind is None else suppress(OSError)
        ):  # what did not fit does not fit now either, and was told
            self._file.close()


class GrowingNpy(GrowingFile):
    """A `.npy` array that grows by its first axis. `count` rows of an existing file are kept, what lies behind them is not."""

    def __init__(self, path: Path, dtype: str, columns: tuple[int, ...] = (), count: int = 0):
        self.dtype, self.columns, self.count = np.dtype(dtype), columns, count
        super().__init__(path, 128 + count * self.dtype.itemsize * math.prod(columns) if count else 0)
        if not count:
            self.write(self._header())

    def append(self, values: np.ndarray) -> None:
        self.write(values.astype(self.dtype, copy=False).tobytes())
        self.count += len(values)

    def finish(self) -> None:
        """Put the true length in the header: numpy pads headers so that the first axis can grow in place."""
        self.make_safe()
        self._file.seek(0)
        self._file.write(self._header())
        self.make_safe()

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self.columns)}
        np.lib.format.write_array_header_1_0(buffer, header)
        assert buffer.tell() == 128
        return buffer.getvalue()
