"""Units in other tools' files, read and written: fairseq, GSLM, textlesslib, slamkit, codecs, speech-resynthesis, Hugging Face.

Documents stream both ways, one at a time. What a format has no place for (whose codebook, K, frame rate, whether runs of equal labels
were collapsed) stands beside the file in `FILE.meta.json`, which is read where it is there; in Parquet it is in the schema. What
neither can hold is refused: nothing is dropped silently.

Formats whose unit is a frame (km, codec, resynthesis) are written frame by frame: units with durations are laid out again.
A path becomes an id by losing the suffix of an audio file, as `wordless index` names utterances; `stem=True` drops the folders, too.
"""

import ast
import difflib
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import expand_path
from pretrain.progress import progress
from pretrain.store.disk import write_json
from pretrain.store.hashes import sha256_file
from units.corpus.sequence import expand
from units.corpus.unit_corpus import Document, UnitCorpus
from units.formats.codec import CODEC
from units.formats.description import FLAGS, Described, Format, Located, Sidecar, read_sidecar, sidecar_path
from units.formats.lines import check_durations, read_lines
from units.formats.parquet import PARQUET, read_parquet_description
from units.formats.records import CODE_KEYS, RESYNTHESIS, SLAMKIT_FEATURES, SLAMKIT_TOKENS
from units.formats.text import GSLM, KM, TEXTLESSLIB

__all__ = [
    "FORMATS",
    "Described",
    "Format",
    "Sidecar",
    "describe_source",
    "export_corpus",
    "fingerprint_source",
    "guess_format",
    "read_located",
    "read_sidecar",
    "read_units",
    "write_units",
]

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (KM, GSLM, TEXTLESSLIB, SLAMKIT_FEATURES, SLAMKIT_TOKENS, CODEC, RESYNTHESIS, PARQUET)
}
SUFFIXES = {".km": "km", ".units": "textlesslib", ".npy": "codec", ".parquet": "parquet"}


def find_format(form: str, where: str = "") -> Format:
    """A format by its name, or a ValueError with the nearest and all names, after `where`."""
    if form in FORMATS:
        return FORMATS[form]
    near = difflib.get_close_matches(form, FORMATS, n=1)
    raise ValueError(
        f"{where}no format {form!r}{f'; did you mean {near[0]!r}?' if near else ''} (there are {', '.join(FORMATS)})"
    )


def guess_format(path: str | Path) -> str:
    """The format of a file or folder, told by its sidecar, its name or its first line. ValueError with all names where that is unclear."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of units")
    if sidecar := read_sidecar(path):
        return find_format(sidecar.format, f"{sidecar_path(path)}: ").name
    if path.is_dir():
        found = {
            SUFFIXES[suffix]
            for suffix in (".npy", ".parquet")
            if next(path.rglob(f"*{suffix}"), None) is not None
        }
    else:
        found = {SUFFIXES[path.suffix]} if path.suffix in SUFFIXES else _by_first_line(path)
    if len(found) == 1:
        return found.pop()
    raise ValueError(
        f"{path}: its format is not clear from its name and first line; say which: format={'|'.join(FORMATS)}"
    )


def _by_first_line(path: Path) -> set[str]:
    line = next(read_lines(path))[1].strip()
    if line.startswith("{"):
        try:
            row = json.loads(line)
            return (
                {"slamkit-tokens"}
                if "audio_repr" in row
                else {"slamkit-features"}
                if "units" in row
                else _python(row)
            )
        except (ValueError, RecursionError):
            try:
                return _python(ast.literal_eval(line))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return set()
    if "|" in line:
        return {"gslm"}
    return {"textlesslib"} if re.fullmatch(r"[^\t]+\t[0-9 ]+", line) else set()


def _python(row: Any) -> set[str]:
    return (
        {"resynthesis"}
        if isinstance(row, dict) and "audio" in row and not row.keys().isdisjoint(CODE_KEYS)
        else set()
    )


def describe_source(path: str | Path, form: str, **options: Any) -> Described:
    """What is known of the units in a file: from its sidecar or schema, otherwise what the format itself says, and None.

    ValueError: a sidecar of another format, options that the format does not have.
    """
    path, found = Path(path), find_format(form)
    options, per_frame = _checked_options(found, options)
    sidecar = read_parquet_description(path) if form == "parquet" else read_sidecar(path)
    if sidecar is not None and sidecar.format != form:
        raise ValueError(
            f"{sidecar_path(path)}: says that {path.name} is {sidecar.format}, not {form}; correct one of the two"
        )
    described = sidecar or Described(**found.describe(path, **options))
    if per_frame is None:
        return described
    if sidecar is not None and sidecar.deduplicated is per_frame:
        told = "deduplicated" if per_frame else "a label per frame"
        raise ValueError(
            f"{path}: its units are {told} by its own account; leave per_frame = {str(per_frame).lower()} out"
        )
    timed = per_frame or (described.timed and not found.per_frame)
    return described.model_copy(update={"deduplicated": not per_frame, "timed": timed})


def _checked_options(form: Format, options: dict[str, Any]) -> tuple[dict[str, Any], bool | None]:
    """The format's own options, and `per_frame`, which all have."""
    options = dict(options)
    per_frame = options.pop("per_frame", None)
    if unknown := options.keys() - set(form.options):
        known = ", ".join((*form.options, "per_frame"))
        raise ValueError(f"format {form.name} has no option {min(unknown)!r}; it has {known}")
    for name, value in {**options, "per_frame": per_frame}.items():
        if value is not None and type(value) is not (bool if name in FLAGS else str):
            raise ValueError(
                f"format {form.name}: option {name} is {value!r}, expected {'true or false' if name in FLAGS else 'a text'}"
            )
        if value is not None and name in form.paths:
            try:
                options[name] = expand_path(str(value))
            except ValueError as error:
                raise ValueError(f"format {form.name}: option {name}: {error}") from None
    return options, per_frame


def fingerprint_source(path: str | Path, form: str, **options: Any) -> str:
    """16 hex digits of a SHA-256 over all that `read_units` reads: the file, or those of the folder, and what lies beside it.

    Everything is read once, some 1 GB a second: a small part of the time that parsing takes.
    """
    path, found = Path(path), find_format(form)
    own, _ = _checked_options(found, options)
    files = [path, sidecar_path(path), *found.companions(path, **own)]
    if path.is_dir():
        suffix = next(suffix for suffix, name in SUFFIXES.items() if name == form)
        files += sorted(path.rglob(f"*{suffix}"))
    hashes = [(os.path.relpath(file, path), sha256_file(file)) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def read_units(path: str | Path, form: str, **options: Any) -> Iterator[Document]:
    """The documents of a file in one of FORMATS, in order, one at a time.

    `units` int32 (n,) or (n, levels); `durations` in frames, uint16 (n,), where the file or its sidecar knows them. `per_frame=True`
    says that a unit is a frame where the file does not say. ValueError at what is malformed: `FILE: line N: what is wrong`.
    """
    return (located.document for located in read_located(path, form, **options))


def read_located(path: str | Path, form: str, **options: Any) -> Iterator[Located]:
    """What `read_units` gives, with the place of each document and the length of its recording where the file has one."""
    path, found = Path(path), find_format(form)
    described = describe_source(path, form, **options)
    own, _ = _checked_options(found, options)
    return _read(path, found, described, own)


def _read(path: Path, form: Format, described: Described, options: dict[str, Any]) -> Iterator[Located]:
    seen = _Seen()
    for located in form.read(path, **options):
        where, document = located.where, located.document
        _require_name(document.id, where)
        seen.add(document)
        levels = document.units.shape[1] if document.units.ndim == 2 else 1
        if levels != described.num_levels:
            raise ValueError(
                f"{where}: {levels} levels of units, expected {described.num_levels} as in the rest"
            )
        _require_below(document.units, described, where)
        if document.durations is None and described.timed and described.deduplicated is False:
            document = document._replace(durations=np.ones(len(document.units), np.uint16))
        if (document.durations is not None) != described.timed:
            whether, told = (
                ("no durations", "they are known") if described.timed else ("durations", "there are none")
            )
            raise ValueError(
                f"{where}: has {whether}, expected that {told}, as the first or {sidecar_path(path).name} says"
            )
        yield located._replace(document=document)
    beside = sidecar_path(path).name
    if isinstance(described, Sidecar) and described.num_documents not in (None, len(seen)):
        raise ValueError(
            f"{path}: {len(seen)} utterances, expected {described.num_documents} ({beside}); it was changed"
        )
    if isinstance(described, Sidecar) and described.checksum not in (None, seen.checksum):
        raise ValueError(
            f"{path}: its units are not those that {beside} describes; remove {beside} and say whose they are"
        )
    if repeated := seen.repeated():
        _name_repeated(form.read(path, **options), repeated)


def _require_below(units: np.ndarray, described: Described, where: str) -> None:
    if described.num_units is not None and (highest := int(units.max())) >= described.num_units:
        whose = f" of codebook {described.codebook}" if described.codebook else ""
        raise ValueError(f"{where}: has the unit {highest}, expected 0 to {described.num_units - 1}{whose}")


def _require_name(name: str, where: str) -> None:
    if not name or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{where}: the name {name!r}, expected text that can be written as UTF-8")


class _Seen:
    """Finds names that come twice, at 8 bytes a name: ten million utterances are no reason to hold their names. And sums up the units."""

    def __init__(self) -> None:
        self.hashes, self._sum = array("q"), 0

    def __len__(self) -> int:
        return len(self.hashes)

    def add(self, document: Document) -> None:
        self.hashes.append(hash(document.id))
        self._sum += int.from_bytes(hashlib.sha256(document.units.astype("<i4").tobytes()).digest()[:8])

    @property
    def checksum(self) -> str:
        """Of all units; in whatever order the documents come, and under whatever names."""
        return f"{self._sum % 2**64:016x}"

    def repeated(self) -> set[int]:
        """Hashes that came more than once."""
        ordered = np.sort(np.array(self.hashes, np.int64))
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _name_repeated(rows: Iterable[Located], repeated: set[int]) -> None:
    first = dict[str, str]()
    for where, document, *_ in rows:
        if hash(document.id) in repeated and first.setdefault(document.id, where) != where:
            raise ValueError(
                f"{where}: a second utterance named {document.id!r}, expected each once (first: {first[document.id]})"
            )


def write_units(
    path: str | Path, form: str, documents: Iterable[Document], described: Described
) -> dict[str, Any]:
    """Write documents to a new file (codec: folder) in one of FORMATS, one at a time, and the description beside it; returns counts.

    ValueError: the file or one beside it exists, there are no documents, or one is not what `described` says or not what the format
    can hold: several levels, names with its separator, units whose durations a format by frame would need.
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
        seen = _Seen()
        document: Document | None = first
        while document is not None:
            if (document.durations is None) != (first.durations is None):
                known = "no durations" if document.durations is None else "durations"
                raise ValueError(
                    f"document {document.id!r}: has {known}, unlike the first; expected all or none to have them"
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
            f"{form.name} has a label per frame, and how many frames these units last is not known; write gslm, textlesslib or parquet"
        )
    deduplicated = False if form.per_frame else described.deduplicated
    timed = form.per_frame or first.durations is not None
    return described.model_copy(update={"num_levels": levels, "deduplicated": deduplicated, "timed": timed})


def _as_held(document: Document, form: Format, described: Described) -> Document:
    """The document as the format holds it, checked against the description; `units` frame by frame where it needs that."""
    where, units, durations = f"document {document.id!r}", document.units, document.durations
    _require_name(document.id, where)
    levels = units.shape[1] if units.ndim == 2 else 1
    if levels != described.num_levels:
        raise ValueError(
            f"{where}: {levels} levels of units, expected {described.num_levels} as in the first"
        )
    if not len(units) or units.dtype.kind not in "iu" or units.min() < 0:
        raise ValueError(
            f"{where}: expected units that are whole numbers, not negative, and at least one; leave it out"
        )
    _require_below(units, described, where)
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
    """Write a unit corpus, or one split of it, as another tool's file. Unit BPE is undone: the file has the codebook's units.

    ValueError: a corpus of speech and text, and what `write_units` refuses.
    """
    corpus = UnitCorpus(corpus_folder)
    if corpus.vocabulary.layout != "units":
        raise ValueError(
            f"{corpus.folder}: has text among its units ({corpus.vocabulary.layout}); pack the labels without text to export"
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
