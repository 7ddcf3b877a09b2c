"""Writing unit corpora, as a stream: memory grows by 24 bytes a document.

Every ten seconds the arrays in `partial/` are flushed and their lengths recorded. A killed process goes on
from there, to the same bytes.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.label_shards import id_hashes
from pretrain.store.artefact import commit, keep_to_plan
from pretrain.store.disk import DiskFull, atomic_path, make_folder, sync_folder, write_json
from pretrain.store.growing import GrowingFile, GrowingNpy
from pretrain.store.hashes import sha256_blocks
from units.corpus.bpe import Merger
from units.corpus.sequence import MAX_DURATION
from units.corpus.vocabulary import Vocabulary

RECORD_SECONDS = 10.0


MAPPED = ("tokens.npy", "durations.npy")


ROW_GROUP = 10_000


SCHEMA = pa.schema([("id", pa.string()), ("split", pa.string()), ("num_frames", pa.int64())])


class Document(NamedTuple):
    """One document to be packed: symbols before unit BPE, (n,) or (n, streams), and how many frames each
    lasts, (n,), if known."""

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
    """Writes the artefact from a stream of documents, or from a function that gives those from number `first`
    on; returns counts.

    Raises ValueError for an empty document, a repeated id, a symbol outside the vocabulary, durations that do
    not fit.
    """
    folder = Path(folder)
    partial = folder / "partial"
    stored: dict[str, Any] = {"vocabulary": vocabulary.model_dump(mode="json"), "codebook": codebook}
    stored |= {"frame_rate_hz": frame_rate_hz, "deduplicated": deduplicated, "timed": timed}
    files = ["tokens.npy", "offsets.npy", *(["durations.npy"] if timed else [])]
    files += ["unit_offsets.npy"] if vocabulary.merges else []
    make_folder(partial)
    keep_to_plan(partial, {"config": config, "parents": parents, **stored})
    for name in files:  # moved already, if the process was killed while `commit` hashed the files
        if (folder / name).is_file() and not (partial / name).is_file():
            os.replace(folder / name, partial / name)
    try:
        counts = _write_arrays(partial, documents, vocabulary, codebook, timed)
        _write_documents(partial / "documents.jsonl", folder)
    except DiskFull:
        raise
    except ValueError:
        shutil.rmtree(partial)  # the input must be changed, and is then another
        raise
    for name in files:
        os.replace(partial / name, folder / name)
    sync_folder(folder)
    numbers: dict[str, Any] = {**counts, "num_symbols": list(vocabulary.sizes)}
    hashes, blocks = {}, {}
    for name in [*files, "documents.parquet"]:
        hashes[name], blocks[name] = sha256_blocks(folder / name)
    extra = {**stored, **numbers, "num_units": vocabulary.num_units}
    extra["blocks"] = {name: blocks[name] for name in MAPPED if name in blocks}
    commit(folder, "units", config, parents, hashes, **extra)
    shutil.rmtree(partial)
    if timed:
        frames, tokens = counts["num_frames"], counts["num_tokens"]
        numbers["hours"] = frames / frame_rate_hz / 3600
        numbers["tokens_per_second"] = tokens / frames * frame_rate_hz
        numbers["frames_per_token"] = frames / tokens
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
    first = done["num_documents"]
    stream = documents(first) if callable(documents) else itertools.islice(documents, first, None)
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
        for starts in (offsets, unit_offsets) if not count else ():
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
        written = {"num_documents": count, "num_tokens": tokens.count, "num_units_written": units_seen}
        return {**written, "num_frames": frames}


def _require_sound(
    document: Document, row: int, folder: Path, vocabulary: Vocabulary, codebook: str, timed: bool
) -> None:
    units, named = document.units, f"{folder}: row {row}, document {document.id!r}"
    streams = len(vocabulary.sizes)
    if units.shape != ((len(units),) if streams == 1 else (len(units), streams)):
        raise ValueError(
            f"{named}: its units have the shape {units.shape}; {streams} stream{'s' * (streams > 1)} of them "
            "go here"
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
            f"{folder}: document {document.id!r} has the unit {units[place]}{level}; the codebook {codebook} "
            f"has 0 .. {limit - 1}"
        )
    if timed:
        if document.durations is None or document.durations.shape != (len(units),):
            have = "none" if document.durations is None else len(document.durations)
            raise ValueError(f"{named}: {len(units)} units, but {have} durations")
        if document.durations.min() < 0 or document.durations.max() > MAX_DURATION:
            raise ValueError(f"{named}: a duration is outside 0 .. {MAX_DURATION} frames")


def _write_documents(lines: Path, folder: Path) -> None:
    """`documents.parquet` from the JSON lines, a few at a time; an id that comes twice is a ValueError with
    its second row."""
    hashes = []
    with (
        atomic_path(folder / "documents.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA) as writer,
    ):
        for rows in _batches(lines):
            columns = zip(zip(*rows, strict=True), SCHEMA, strict=True)
            table = pa.table([pa.array(column, field.type) for column, field in columns], SCHEMA)
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
