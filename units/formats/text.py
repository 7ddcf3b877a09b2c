"""Units as plain text, an utterance per line: fairseq's `.km`, GSLM's `name|units` and textlesslib's
`.units`.

All three hold one level. A `.km` line has a label per frame. The other two may be deduplicated or not and do
not say which; their durations lie in a second file.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from units.corpus.corpus_writing import Document
from units.formats.description import Described, Format, Located
from units.formats.lines import (
    check_durations,
    id_of_path,
    parse_integers,
    path_of_id,
    read_lines,
    spaced,
    written,
)

SAMPLE_RATE = 16000


def _tsv(path: Path) -> Path:
    """`train.tsv` for `train.km`, and for `train_0_1.km`, as `dump_km_label.py` names the only shard."""
    return path.with_name(path.stem.removesuffix("_0_1") + ".tsv")


def read_km(path: Path, tsv: str | None = None, stem: bool = False) -> Iterator[Located]:
    """fairseq's `dump_km_label.py`: a line of labels per row of the `.tsv`, whose paths name the utterances.

    The `.tsv` has the root on its first line, then `path<TAB>samples`.
    """
    names = Path(tsv) if tsv else _tsv(path)
    if not names.is_file():
        raise ValueError(
            f"{path}: no {names} to name its lines; say where it is (tsv=…), put the shards of a .km "
            "together first, or read the file as textlesslib, which numbers its lines"
        )
    rows = read_lines(names)
    if re.search(r"\t\d+$", next(rows)[1]):
        raise ValueError(f"{names}: line 1: is an utterance, expected the root folder")
    lines = read_lines(path)
    for line, row in zip_longest(lines, rows):
        if line is None or row is None:
            where, shorter, rest = (line[0], names, lines) if line else (row[0], path, rows)
            raise ValueError(
                f"{where}: nothing in {shorter} belongs to this and {sum(1 for _ in rest)} lines after it; "
                "the labels and the .tsv are of different utterances"
            )
        match = re.fullmatch(r"(.+)\t([0-9]{1,15})", row[1])
        if match is None:
            raise ValueError(f"{row[0]}: expected path<TAB>samples, got {row[1][:80]!r}")
        document = Document(
            id_of_path(match[1], row[0], stem), None, parse_integers(line[1], line[0], "label")
        )
        yield Located(line[0], document, int(match[2]), row[0])


def write_km(path: Path, documents: Iterator[Document], described: Described) -> None:
    """`.km`, and the `.tsv` that names its lines: root `.`, a path for each id, and the samples at 16 kHz
    that its frames span."""
    hop = SAMPLE_RATE / (described.frame_rate_hz or 50.0)
    with (
        written(path) as labels,
        written(_tsv(path)) as names,
    ):  # the labels, entered first, become visible last
        names.write(".\n")
        for document in documents:
            require_writable(document.id, "\t", "km")
            names.write(f"{path_of_id(document.id)}\t{round(len(document.units) * hop)}\n")
            labels.write(spaced(document.units) + "\n")


def _gslm_durations(path: Path) -> Path:
    return path.with_name(path.name + ".durations")


def _textlesslib_durations(path: Path) -> Path:
    return path.with_suffix(".durations")


def read_gslm(path: Path, durations: str | None = None) -> Iterator[Located]:
    """GSLM's `quantize_with_kmeans.py`: `name|3 49 7`. Durations, `name|1 4 2`, lie in `durations` or in
    `FILE.durations`."""
    yield from _read_named(path, _beside(durations, _gslm_durations(path)), _split_gslm)


def read_textlesslib(path: Path, durations: str | None = None) -> Iterator[Located]:
    """textlesslib's `transcribe.py`: `3 49 7` or `name<TAB>3 49 7`; durations alike in `durations`, or in
    `X.durations` beside `X.units`. Lines without a name get their number, from 0. A stream of f0s beside them
    is not read."""
    yield from _read_named(path, _beside(durations, _textlesslib_durations(path)), _split_textlesslib)


def _beside(given: str | None, default: Path) -> Path | None:
    return Path(given) if given else default if default.is_file() else None


Split = Callable[[str, str, int], tuple[str, str]]


def _read_named(path: Path, durations: Path | None, split: Split) -> Iterator[Located]:
    lasting = read_lines(durations) if durations else iter(())
    for number, (where, line) in enumerate(read_lines(path)):
        name, text = split(line, where, number)
        units, times = parse_integers(text, where), None
        if durations:
            there, other = next(lasting, (str(durations), ""))
            if not other:
                raise ValueError(
                    f"{durations}: ends before {where}; expected a line of durations for every line of units"
                )
            named, text = split(other, there, number)
            if named != name:
                raise ValueError(f"{there}: durations of {named!r}, expected those of {name!r} ({where})")
            times = check_durations(parse_integers(text, there, "duration"), units, there)
        yield Located(where, Document(name, None, units, times))
    if (left := next(lasting, None)) is not None:
        raise ValueError(f"{left[0]}: durations of an utterance that {path} does not have")


def _split_gslm(line: str, where: str, number: int) -> tuple[str, str]:
    if line.count("|") != 1:
        raise ValueError(f"{where}: {line.count('|')} of '|', expected one: name|3 49 7")
    name, _, text = line.partition("|")
    if not name:
        # quantize_with_kmeans.py strips the suffix letter by letter: `alfa.flac` loses all of its letters
        raise ValueError(
            f"{where}: the name before '|' is empty; GSLM's script takes more than the suffix off names such "
            "as alfa.flac"
        )
    return name, text


def _split_textlesslib(line: str, where: str, number: int) -> tuple[str, str]:
    name, tab, text = line.partition("\t")
    if not tab:
        return str(number), line
    if not name:
        raise ValueError(f"{where}: the name before the tab is empty")
    return name, text


def write_gslm(path: Path, documents: Iterator[Document], described: Described) -> None:
    """`name|3 49 7`; durations of deduplicated units likewise in `FILE.durations`, of which GSLM knows
    nothing."""
    _write_named(
        path,
        documents,
        _gslm_durations(path) if described.timed and described.deduplicated is not False else None,
        "|",
        "gslm",
    )


def write_textlesslib(path: Path, documents: Iterator[Document], described: Described) -> None:
    """`name<TAB>3 49 7`; durations, where there are any, likewise in `X.durations` beside `X.units`."""
    _write_named(
        path, documents, _textlesslib_durations(path) if described.timed else None, "\t", "textlesslib"
    )


def _write_named(
    path: Path, documents: Iterator[Document], durations: Path | None, separator: str, form: str
) -> None:
    with ExitStack() as stack:
        file = stack.enter_context(written(path))
        lasting: TextIO | None = stack.enter_context(written(durations)) if durations else None
        for document in documents:
            require_writable(document.id, separator, form)
            file.write(f"{document.id}{separator}{spaced(document.units)}\n")
            if lasting is not None:
                assert document.durations is not None
                lasting.write(f"{document.id}{separator}{spaced(document.durations)}\n")


def require_writable(name: str, separator: str, form: str) -> None:
    """A name that a line can hold and give back, or a ValueError."""
    wrong = next((character for character in f"{separator}\n\r\0\ufeff" if character in name), None)
    if wrong is not None or not name.strip():
        what = "is blank" if wrong is None else f"has {wrong!r}"
        raise ValueError(f"document {name!r}: its id {what}, which {form} cannot write; export it as parquet")


KM = Format(
    "km",
    read_km,
    write_km,
    lambda path, **options: {"deduplicated": False, "timed": True},
    per_frame=True,
    companions=lambda path, tsv=None, **options: [Path(tsv) if tsv else _tsv(path)],
    options=("tsv", "stem"),
    paths=("tsv",),
)
GSLM = Format(
    "gslm",
    read_gslm,
    write_gslm,
    lambda path, durations=None, **options: {"timed": _beside(durations, _gslm_durations(path)) is not None},
    companions=lambda path, durations=None: [Path(durations) if durations else _gslm_durations(path)],
    options=("durations",),
    paths=("durations",),
)
TEXTLESSLIB = Format(
    "textlesslib",
    read_textlesslib,
    write_textlesslib,
    lambda path, durations=None, **options: {
        "timed": _beside(durations, _textlesslib_durations(path)) is not None
    },
    companions=lambda path, durations=None: [Path(durations) if durations else _textlesslib_durations(path)],
    options=("durations",),
    paths=("durations",),
)
