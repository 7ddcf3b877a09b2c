"""Lists of recordings: fairseq's `.tsv` with a `.wrd` beside it, JSON lines, and JSON lines of alignments."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat

from pretrain.data.sources.candidates import (
    About,
    Candidate,
    Names,
    Row,
    Triples,
    as_phones,
    as_words,
    parse_row,
)
from pretrain.data.utterance import Phone, Word
from pretrain.store.plain_text import read_text


class _AudioRow(About):
    audio_filepath: str
    id: str | None = None
    offset: Annotated[FiniteFloat, Field(ge=0)] | None = None
    duration: Annotated[FiniteFloat, Field(gt=0)] | None = None


class _AlignmentRow(BaseModel, coerce_numbers_to_str=True):
    id: str
    phones: Triples | None = None
    words: Triples | None = None


def read_tsv(path: Path, prefix: str) -> list[Candidate]:
    """The rows of a fairseq `.tsv`, with the transcripts of the `.wrd` of its name. ValueError names a row
    that is none."""
    root, *lines = _lines(path)
    transcripts: list[str] | None = (
        _lines(path.with_suffix(".wrd")) if path.with_suffix(".wrd").is_file() else None
    )
    if transcripts is not None and len(transcripts) != len(lines):
        raise ValueError(
            f"{path.with_suffix('.wrd')}: {len(transcripts)} transcripts for the {len(lines)} rows of "
            f"{path.name}"
        )
    candidates = []
    for row, line in enumerate(lines):
        match = re.fullmatch(r"(.+)\t([0-9]{1,18})", line)
        if match is None:
            raise ValueError(f"{path} line {row + 2}: expected path<TAB>samples, got {line!r}")
        audio = os.path.join(root, match[1])
        candidate = Candidate("", audio, match[1], f"{path} line {row + 2}", num_samples=int(match[2]))
        candidate.text = transcripts[row] if transcripts else None
        candidates.append(candidate)
    names = Names([candidate.relative for candidate in candidates])
    for candidate in candidates:
        candidate.id, candidate.has_twin = (
            prefix + names[candidate.relative],
            names.has_twin(candidate.relative),
        )
    return candidates


def read_json_lines(path: Path, prefix: str) -> list[Candidate]:
    """The rows of JSON lines. ValueError names the line and key of the first mistake."""
    candidates = []
    base = os.path.abspath(path.parent)
    for origin, row in _parse_lines(path, _AudioRow):
        audio = os.path.abspath(path.parent / row.audio_filepath)
        times = as_phones(row.phones, origin), as_words(row.words, origin)
        candidates.append(
            Candidate(
                row.id or "",
                audio,
                "",
                origin,
                row.speaker,
                row.text,
                row.split,
                *times,
                row.offset or 0.0,
                row.duration,
            )
        )
    # Ids are relative to the list's folder, or to what all paths share when some lie elsewhere; segments add
    # their start.
    if not all(candidate.path.startswith(os.path.join(base, "")) for candidate in candidates):
        base = os.path.commonpath({os.path.dirname(candidate.path) for candidate in candidates})
    repeated = {
        path for path, count in Counter(candidate.path for candidate in candidates).items() if count > 1
    }
    for candidate in candidates:
        candidate.relative = os.path.relpath(candidate.path, base)
    names = Names([candidate.relative for candidate in candidates if not candidate.id])
    for candidate in candidates:
        if not candidate.id:
            segment = f"-{candidate.offset_seconds:.3f}" if candidate.path in repeated else ""
            candidate.id = prefix + names[candidate.relative] + segment
            candidate.has_twin = names.has_twin(candidate.relative)
    return candidates


def attach_alignments(candidates: list[Candidate], path: str) -> None:
    """Add phones, words or both by utterance id from JSON lines `{"id", "phones": [[start, end, phone], ...],
    "words": [...]}`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such alignments")
    alignments: dict[str, tuple[list[Phone] | None, list[Word] | None]] = {}
    for origin, row in _parse_lines(Path(path), _AlignmentRow):
        if row.phones is None and row.words is None:
            raise ValueError(f"{origin}: neither 'phones' nor 'words' of {row.id!r}")
        alignments[row.id] = as_phones(row.phones, origin), as_words(row.words, origin)
    if alignments.keys().isdisjoint(candidate.id for candidate in candidates):
        raise ValueError(
            f"{path}: none of its {len(alignments)} ids is among the utterances, such as {candidates[0].id!r}"
        )
    for candidate in candidates:
        phones, words = alignments.get(candidate.id, (None, None))
        candidate.phones = candidate.phones if phones is None else phones
        candidate.words = candidate.words if words is None else words


def _parse_lines(path: Path, row_class: type[Row]) -> Iterator[tuple[str, Row]]:
    """(origin, row) for each line that is not blank; the first mistake is a ValueError naming the line, key
    and remedy."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield (origin := f"{path} line {number}"), parse_row(row_class, line, origin)


def _lines(path: Path) -> list[str]:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no file")
    return read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
