"""Units in other tools' files, read and written: fairseq, GSLM, textlesslib, slamkit, codecs,
speech-resynthesis, Hugging Face.

Documents stream both ways, one at a time. What a format has no place for (whose codebook, K, frame rate,
whether runs of equal labels were collapsed) stands beside the file in `FILE.meta.json`, which is read where
it is there; in Parquet it is in the schema. What neither can hold is refused: nothing is dropped silently.

Formats whose unit is a frame (km, codec, resynthesis) are written frame by frame: units with durations are
laid out again. A path becomes an id by losing the suffix of an audio file, as `wordless index` names
utterances; `stem=True` drops the folders, too.
"""

import ast
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
from pretrain.store.hashes import sha256_file
from units.corpus.corpus_writing import Document
from units.formats.description import FLAGS, Described, Format, Located, Sidecar, read_sidecar, sidecar_path
from units.formats.known import FORMATS, SUFFIXES, find_format
from units.formats.lines import read_lines
from units.formats.parquet import read_parquet_description
from units.formats.records import CODE_KEYS


def guess_format(path: str | Path) -> str:
    """The format of a file or folder, told by its sidecar, its name or its first line. ValueError with all
    names where that is unclear."""
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
    """What is known of the units in a file: from its sidecar or schema, otherwise what the format itself
    says, and None.

    ValueError: a sidecar of another format, options that the format does not have.
    """
    path, found = Path(path), find_format(form)
    options, per_frame = _checked_options(found, options)
    sidecar = read_parquet_description(path) if form == "parquet" else read_sidecar(path)
    if sidecar is not None and sidecar.format != form:
        raise ValueError(
            f"{sidecar_path(path)}: says that {path.name} is {sidecar.format}, not {form}; correct one of "
            "the two"
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
                f"format {form.name}: option {name} is {value!r}, expected "
                f"{'true or false' if name in FLAGS else 'a text'}"
            )
        if value is not None and name in form.paths:
            try:
                options[name] = expand_path(str(value))
            except ValueError as error:
                raise ValueError(f"format {form.name}: option {name}: {error}") from None
    return options, per_frame


def fingerprint_source(path: str | Path, form: str, **options: Any) -> str:
    """16 hex digits of a SHA-256 over all that `read_units` reads: the file, or those of the folder, and what
    lies beside it.

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

    `units` int32 (n,) or (n, levels); `durations` in frames, uint16 (n,), where the file or its sidecar knows
    them. `per_frame=True` says that a unit is a frame where the file does not say. ValueError at what is
    malformed: `FILE: line N: what is wrong`.
    """
    return (located.document for located in read_located(path, form, **options))


def read_located(path: str | Path, form: str, **options: Any) -> Iterator[Located]:
    """What `read_units` gives, with the place of each document and the length of its recording where the file
    has one."""
    path, found = Path(path), find_format(form)
    described = describe_source(path, form, **options)
    own, _ = _checked_options(found, options)
    return _read(path, found, described, own)


def _read(path: Path, form: Format, described: Described, options: dict[str, Any]) -> Iterator[Located]:
    seen = Seen()
    for located in form.read(path, **options):
        where, document = located.where, located.document
        require_name(document.id, where)
        seen.add(document)
        levels = document.units.shape[1] if document.units.ndim == 2 else 1
        if levels != described.num_levels:
            raise ValueError(
                f"{where}: {levels} levels of units, expected {described.num_levels} as in the rest"
            )
        require_below(document.units, described, where)
        if document.durations is None and described.timed and described.deduplicated is False:
            document = document._replace(durations=np.ones(len(document.units), np.uint16))
        if (document.durations is not None) != described.timed:
            whether, told = (
                ("no durations", "they are known") if described.timed else ("durations", "there are none")
            )
            raise ValueError(
                f"{where}: has {whether}, expected that {told}, as the first or {sidecar_path(path).name} "
                "says"
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


def require_below(units: np.ndarray, described: Described, where: str) -> None:
    """Raises ValueError for a unit beyond the codebook."""
    if described.num_units is not None and (highest := int(units.max())) >= described.num_units:
        whose = f" of codebook {described.codebook}" if described.codebook else ""
        raise ValueError(f"{where}: has the unit {highest}, expected 0 to {described.num_units - 1}{whose}")


def require_name(name: str, where: str) -> None:
    """Raises ValueError for a name that UTF-8 cannot hold, and for none."""
    if not name or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{where}: the name {name!r}, expected text that can be written as UTF-8")


class Seen:
    """Finds names that come twice, at 8 bytes a name: ten million utterances are no reason to hold their
    names. And sums up the units."""

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
                f"{where}: a second utterance named {document.id!r}, expected each once (first: "
                f"{first[document.id]})"
            )
