"""What a source of audio claims: one `Candidate` per utterance, before any recording is opened.

A source is one of
- a folder: every wav, flac, ogg and mp3 beneath it. Transcripts come from LibriSpeech's `*.trans.txt` (which also name the
  speaker) or from `X.txt` beside `X.wav`;
- a fairseq `.tsv`: the root on the first line, then `path<TAB>samples`; a `.wrd` file of the same name holds transcripts;
- JSON lines (`.jsonl` or NeMo's `.json`): `audio_filepath` and, where known, `id`, `text`, `speaker`, `split`, `offset` and
  `duration` in seconds, and `phones` as [start, end, phone]; other keys are ignored. Relative paths start at the file's folder.

An id, where none is given, is the path below the folder without its suffix.
"""

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from pretrain.manifest import Phone

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}

Row = TypeVar("Row", bound=BaseModel)


@dataclass(slots=True)
class Candidate:
    """An utterance that the source claims; `origin` is where, for messages."""

    id: str
    path: str
    relative: str
    origin: str
    speaker: str | None = None
    text: str | None = None
    split: str | None = None
    phones: list[Phone] | None = None
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    num_samples: int | None = None


def read_source(source: str) -> list[Candidate]:
    """What a folder, a `.tsv` or a JSON-lines file lists, unverified. A source of no known kind is a ValueError."""
    path = Path(source)
    if path.is_dir():
        candidates = _read_folder(path)
    elif not path.is_file():
        raise ValueError(f"{source}: no such folder or file")
    elif path.suffix == ".tsv":
        candidates = _read_tsv(path)
    elif path.suffix in (".jsonl", ".json"):
        candidates = _read_json_lines(path)
    else:
        raise ValueError(f"{source}: a source is a folder, a .tsv, or JSON lines (.jsonl or .json)")
    if not candidates:
        raise ValueError(f"{source}: no audio found" + (f" (looked for {', '.join(sorted(SUFFIXES))})" if path.is_dir() else ""))
    return candidates


def _read_folder(root: Path) -> list[Candidate]:
    candidates = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        transcripts: dict[str, str] = {}
        for name in names:
            if name.endswith(".trans.txt"):
                transcripts |= {stem: text for stem, _, text in (line.partition(" ") for line in _lines(Path(folder, name)))}
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            relative = path.relative_to(root)
            candidate = Candidate(relative.with_suffix("").as_posix(), str(path), relative.as_posix(), str(path))
            if path.stem in transcripts:
                candidate.text, candidate.speaker = transcripts[path.stem], path.stem.split("-")[0]
            elif path.with_suffix(".txt").is_file():
                candidate.text = " ".join(_lines(path.with_suffix(".txt"))).strip()
            candidates.append(candidate)
    return candidates


def _read_tsv(path: Path) -> list[Candidate]:
    root, *lines = _lines(path)
    transcripts: list[str] | None = _lines(path.with_suffix(".wrd")) if path.with_suffix(".wrd").is_file() else None
    if transcripts is not None and len(transcripts) != len(lines):
        raise ValueError(f"{path.with_suffix('.wrd')}: {len(transcripts)} transcripts for the {len(lines)} rows of {path.name}")
    candidates = []
    for row, line in enumerate(lines):
        match = re.fullmatch(r"(.+)\t(\d+)", line)
        if match is None:
            raise ValueError(f"{path} line {row + 2}: expected path<TAB>samples, got {line!r}")
        audio = os.path.join(root, match[1])
        candidate = Candidate(os.path.splitext(match[1])[0], audio, match[1], f"{path} line {row + 2}", num_samples=int(match[2]))
        candidate.text = transcripts[row] if transcripts else None
        candidates.append(candidate)
    return candidates


Triples = list[tuple[Annotated[FiniteFloat, Field(ge=0)], FiniteFloat, str]]


class _AudioRow(BaseModel, coerce_numbers_to_str=True):
    audio_filepath: str
    id: str | None = None
    text: str | None = None
    speaker: str | None = None
    split: str | None = None
    offset: Annotated[FiniteFloat, Field(ge=0)] | None = None
    duration: Annotated[FiniteFloat, Field(gt=0)] | None = None
    phones: Triples | None = None


class _AlignmentRow(BaseModel, coerce_numbers_to_str=True):
    id: str
    phones: Triples


def _read_json_lines(path: Path) -> list[Candidate]:
    rows = list(_parse_lines(path, _AudioRow))
    paths = [os.path.abspath(path.parent / row.audio_filepath) for _, row in rows]
    # Ids are relative to the list's folder, or to what all paths share when some lie elsewhere; segments add their start.
    base = os.path.abspath(path.parent)
    if not all(audio.startswith(os.path.join(base, "")) for audio in paths):
        base = os.path.commonpath(map(os.path.dirname, paths))
    repeated = {audio for audio, count in Counter(paths).items() if count > 1}
    candidates = []
    for (origin, row), audio in zip(rows, paths, strict=True):
        relative = os.path.relpath(audio, base)
        name = os.path.splitext(relative)[0] + (f"-{row.offset or 0:.3f}" if audio in repeated else "")
        phones = None if row.phones is None else _phones(row.phones, origin)
        candidates.append(
            Candidate(
                row.id or name, audio, relative, origin, row.speaker, row.text, row.split, phones, row.offset or 0.0, row.duration
            )
        )
    return candidates


def attach_alignments(candidates: list[Candidate], path: str) -> None:
    """Add phones by utterance id from JSON lines `{"id", "phones": [[start, end, phone], ...]}`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such alignments")
    alignments = {row.id: _phones(row.phones, origin) for origin, row in _parse_lines(Path(path), _AlignmentRow)}
    if alignments.keys().isdisjoint(candidate.id for candidate in candidates):
        raise ValueError(f"{path}: none of its {len(alignments)} ids is among the utterances, such as {candidates[0].id!r}")
    for candidate in candidates:
        candidate.phones = alignments.get(candidate.id, candidate.phones)


def _phones(triples: Triples, origin: str) -> list[Phone]:
    """In order and without overlap beyond 1 ms of rounding, or a ValueError."""
    phones = sorted(Phone(*triple) for triple in triples)
    for phone, following in pairwise([*phones, Phone(math.inf, math.inf, "")]):
        if phone.end < phone.start or phone.end > following.start + 0.001:
            raise ValueError(f"{origin}: phone {phone.phone!r} at {phone.start} s ends before it starts or overlaps the next")
    return phones


def _parse_lines(path: Path, row_class: type[Row]) -> Iterator[tuple[str, Row]]:
    """(origin, row) for each line that is not blank; the first mistake is a ValueError naming the line, key and remedy."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        origin = f"{path} line {number}"
        try:
            yield origin, row_class.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] != "missing" or key not in row_class.model_fields:
                got = repr(problem["input"])
                raise ValueError(f"{origin}: {key + ': ' if key else ''}{problem['msg']}, got {got[:80]}") from None
            near = difflib.get_close_matches(key, problem["input"], n=1)
            hint = f"did you mean it by {near[0]!r}?" if near else f"it has {', '.join(problem['input']) or 'no keys'}"
            raise ValueError(f"{origin}: no {key!r}; {hint}") from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def require_distinct_ids(candidates: list[Candidate]) -> None:
    """Two rows under one id are a ValueError naming both."""
    seen: dict[str, Candidate] = {}
    for candidate in candidates:
        other = seen.setdefault(candidate.id, candidate)
        if other is not candidate:
            raise ValueError(f"id {candidate.id!r} names both {other.origin} and {candidate.origin}; ids must differ")


def name_speakers(candidates: list[Candidate], pattern: str) -> None:
    """Read the speaker off each relative path: the regular expression's group `speaker`, or its first."""
    compiled = re.compile(pattern)
    group: str | int = "speaker" if "speaker" in compiled.groupindex else 1
    for candidate in candidates:
        match = compiled.search(candidate.relative)
        if match is None or not match[group]:
            raise ValueError(f"speaker_pattern {pattern!r} names no speaker in {candidate.relative!r}")
        candidate.speaker = match[group]
