"""Units to files of other tools."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pretrain.progress import progress
from pretrain.store.disk import write_json
from units.corpus.corpus_writing import Document
from units.corpus.sequence import expand
from units.corpus.unit_corpus import UnitCorpus
from units.formats.description import Described, Format, Sidecar, sidecar_path
from units.formats.known import FORMATS, find_format
from units.formats.lines import check_durations
from units.formats.reading import Seen, require_below, require_name


def write_units(
    path: str | Path, form: str, documents: Iterable[Document], described: Described
) -> dict[str, Any]:
    """Write documents to a new file (codec: folder) in one of FORMATS, one at a time, and the description
    beside it; returns counts.

    ValueError: the file or one beside it exists, there are no documents, or one is not what `described` says
    or not what the format can hold: several levels, names with its separator, units whose durations a format
    by frame would need.
    """
    path, found = Path(path), find_format(form)
    for taken in (path, *found.companions(path)):
        if taken.exists():
            raise ValueError(f"{taken}: exists; remove it or choose another name")
    if path in found.companions(path):
        raise ValueError(
            f"{path}: {form} needs this name for the file that goes with it; choose another suffix"
        )
    stream = iter(documents)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{path}: there are no documents to write")
    described = _as_written(first, found, described)
    counts = {"num_documents": 0, "units_written": 0}

    def checked() -> Iterator[Document]:
        seen = Seen()
        document: Document | None = first
        while document is not None:
            if (document.durations is None) != (first.durations is None):
                known = "no durations" if document.durations is None else "durations"
                raise ValueError(
                    f"document {document.id!r}: has {known}, unlike the first; expected all or none to have "
                    "them"
                )
            document = _as_held(document, found, described)
            seen.add(document)
            counts["units_written"] += len(document.units)
            yield document
            document = next(stream, None)
        if repeated := seen.repeated():
            rows = [row for row, value in enumerate(seen.hashes) if value == min(repeated)]
            raise ValueError(f"{path}: documents {rows[0]} and {rows[1]} (from 0) have the same id")
        counts["num_documents"] = len(seen)
        if found.sidecar:  # now, while the file itself is not visible yet: it is never without
            write_json(sidecar_path(path), Sidecar.of(described, form, len(seen), seen.checksum).resolved())

    found.write(path, checked(), described)
    return {"format": form, **counts, "codebook": described.codebook}


def _as_written(first: Document, form: Format, described: Described) -> Described:
    """The description of what will be in the file, given its first document."""
    levels = first.units.shape[1] if first.units.ndim == 2 else 1
    if levels > 1 and not form.levels:
        holding = " or ".join(name for name, other in FORMATS.items() if other.levels)
        raise ValueError(f"{form.name} holds one level of units, and these have {levels}; write {holding}")
    if form.per_frame and first.durations is None and described.deduplicated is not False:
        raise ValueError(
            f"{form.name} has a label per frame, and how many frames these units last is not known; write "
            "gslm, textlesslib or parquet"
        )
    deduplicated = False if form.per_frame else described.deduplicated
    timed = form.per_frame or first.durations is not None
    return described.model_copy(update={"num_levels": levels, "deduplicated": deduplicated, "timed": timed})


def _as_held(document: Document, form: Format, described: Described) -> Document:
    """The document as the format holds it, checked against the description; `units` frame by frame where it
    needs that."""
    where, units, durations = f"document {document.id!r}", document.units, document.durations
    require_name(document.id, where)
    levels = units.shape[1] if units.ndim == 2 else 1
    if levels != described.num_levels:
        raise ValueError(
            f"{where}: {levels} levels of units, expected {described.num_levels} as in the first"
        )
    if not len(units) or units.dtype.kind not in "iu" or units.min() < 0:
        raise ValueError(
            f"{where}: expected units that are whole numbers, not negative, and at least one; leave it out"
        )
    require_below(units, described, where)
    if durations is not None:
        durations = check_durations(durations, units, where)
    units = units[:, 0] if units.ndim == 2 and levels == 1 else units
    if form.per_frame:
        return document._replace(
            units=units if durations is None else expand(units, durations), durations=None
        )
    if durations is not None and described.deduplicated is False and durations.max() > 1:
        raise ValueError(
            f"{where}: a unit lasts {durations.max()} frames, expected 1 of units that are not deduplicated"
        )
    return document._replace(units=units, durations=durations)


def export_corpus(
    corpus_folder: str | Path, out: str | Path, form: str, split: str | None = None
) -> dict[str, Any]:
    """Write a unit corpus, or one split of it, as another tool's file. Unit BPE is undone: the file has the
    codebook's units.

    ValueError: a corpus of speech and text, and what `write_units` refuses.
    """
    corpus = UnitCorpus(corpus_folder)
    if corpus.vocabulary.layout != "units":
        raise ValueError(
            f"{corpus.folder}: has text among its units ({corpus.vocabulary.layout}); pack the labels "
            "without text to export"
        )
    rows = corpus.documents(split)
    described = Described(
        codebook=corpus.codebook,
        num_units=corpus.num_units,
        num_levels=corpus.num_levels,
        frame_rate_hz=corpus.frame_rate_hz,
        deduplicated=corpus.deduplicated,
        timed=corpus.timed,
        source=corpus.fingerprint,
    )

    def documents() -> Iterator[Document]:
        with progress("export", len(rows), "document") as advance:
            for i in rows.tolist():
                yield Document(
                    corpus.ids[i],
                    corpus.splits[i],
                    corpus.units(i),
                    corpus.durations(i) if corpus.timed else None,
                )
                advance(1)

    return write_units(out, form, documents(), described)
