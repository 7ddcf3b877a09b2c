"""What a source of audio claims: one `Candidate` per utterance, before any recording is opened.

A source is one of
- a folder: every wav, flac, ogg and mp3 beneath it. Transcripts come from LibriSpeech's `*.trans.txt` (which also name the
  speaker) or from `X.txt` beside `X.wav`, word times from the `*.alignment.txt` of LibriSpeech's alignments;
- a fairseq `.tsv`: the root on the first line, then `path<TAB>samples`; a `.wrd` file of the same name holds transcripts;
- JSON lines (`.jsonl` or NeMo's `.json`): `audio_filepath` and, where known, `id`, `text`, `speaker`, `split`, `offset` and
  `duration` in seconds, and `phones` and `words` as [start, end, name]; other keys are ignored. Relative paths start at the
  file's folder;
- an uncompressed `.tar`, read in place (see `pretrain.shards`); those beneath a folder are found too;
- a glob such as `shards/*.tar` of any of these, or a list of sources.

An id, where none is given, is the path below the folder without its suffix, for a member of a tar the tar's path, a slash and the
member's. With several sources the source's own name comes first, so that equal names in two corpora stay apart.
"""

import difflib
import glob
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

from pretrain.audio import Member
from pretrain.manifest import Phone, Word
from pretrain.shards import LARGEST_TEXT, is_tar, list_members, read_member, require_uncompressed

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
OTHER_SUFFIXES = {".opus", ".m4a", ".aac", ".mp4", ".webm", ".sph"}  # in other tools' lists; such recordings are not read here
# A line of LibriSpeech's alignments: `84-1-0000 ",GO,DO," "0.49,0.89,1.27,1.61"`.
WORD_ENDS = re.compile(r'(\S+) "([^"]*)" "([\d.,]*)"')

_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # Python has a surrogate for each byte of a file's name that is not UTF-8

Row = TypeVar("Row", bound=BaseModel)


@dataclass(slots=True)
class Candidate:
    """An utterance that the source claims; `origin` is where, for messages, and `problem` what is already known to be wrong."""

    id: str
    path: str
    relative: str
    origin: str
    speaker: str | None = None
    text: str | None = None
    split: str | None = None
    phones: list[Phone] | None = None
    words: list[Word] | None = None
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    num_samples: int | None = None
    member: Member | None = None
    problem: str | None = None


def read_sources(sources: list[str]) -> list[Candidate]:
    """What the sources list, unverified. One that does not exist, is of no known kind or holds no audio is a ValueError."""
    if len(sources) > 1:
        found = [candidate for source in sources for candidate in _read_source(source, _prefix(Path(os.path.abspath(source))))]
    else:
        found = _read_source(sources[0], "")
    for candidate in found:
        _refuse_names(candidate)
    return found


def _refuse_names(candidate: Candidate) -> None:
    """Ids are written into tables and lists, a line each: one that is no line of UTF-8 is a problem, and so is such a path.

    Both are kept with escapes in place of what they may not hold.
    """
    for which, name in (("id", candidate.id), ("path", candidate.path)):
        if _UNFIT.search(name):
            plain = _UNFIT.sub(lambda match: ascii(match[0])[1:-1], name)
            candidate.problem = candidate.problem or f"has the {which} '{plain}', with control characters or no UTF-8; rename it"
            setattr(candidate, which, plain)


def _prefix(path: Path) -> str:
    """What keeps the ids of several sources apart; those of tars begin with the tar's name anyway."""
    return "" if is_tar(path) or glob.has_magic(path.name) else _without_suffix(path, path.name) + "/"


def without_audio_suffix(name: str) -> str:
    """A recording's name without the suffix of an audio file, as ids are; other names stay as they are."""
    base, dot, suffix = name.rpartition(".")
    return base if dot + suffix.lower() in SUFFIXES | OTHER_SUFFIXES else name


def _without_suffix(path: Path, name: str) -> str:
    """`name` without its suffix where `path` is a file; a folder such as `cv-1.0` has none."""
    return os.path.splitext(name)[0] if path.is_file() else name


def _read_source(source: str, prefix: str) -> list[Candidate]:
    """`prefix` comes before every id that the source does not give itself."""
    path = Path(source)
    if glob.has_magic(source) and not path.exists():
        paths = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
        base = Path(os.path.commonpath([os.path.dirname(os.path.abspath(match)) for match in paths])) if paths else path
        candidates = []
        for match in paths:
            name = Path(os.path.abspath(match)).relative_to(base)
            own = "" if is_tar(match) else _without_suffix(match, name.as_posix()) + "/"
            candidates += _read_one(match, prefix + own, base)
    else:
        candidates = _read_one(path, prefix, path.parent)
    if not candidates:
        looked_for = f" (looked for {', '.join(sorted(SUFFIXES))} and .tar)" if path.is_dir() else ""
        raise ValueError(f"{source}: no audio found{looked_for}")
    return candidates


def _read_one(path: Path, prefix: str, base: Path) -> list[Candidate]:
    """Of a tar the ids start with its path below `base`."""
    if path.is_dir():
        return _read_folder(path, prefix)
    if not path.is_file():
        raise ValueError(f"{path}: no such folder or file")
    if is_tar(path):
        return _read_tar(path, base, prefix)
    if path.suffix == ".tsv":
        return _read_tsv(path, prefix)
    if path.suffix in (".jsonl", ".json"):
        return _read_json_lines(path, prefix)
    raise ValueError(f"{path}: a source is a folder, a .tar, a .tsv, JSON lines (.jsonl or .json), or a glob of them")


def _read_folder(root: Path, prefix: str) -> list[Candidate]:
    candidates, tars = [], []
    above = {str(root): {os.path.realpath(root)}}  # what a folder lies in, by way of links
    for folder, subfolders, names in os.walk(root, followlinks=True):
        holding = above.pop(folder)
        below = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders if not name.startswith(".")}
        subfolders[:] = sorted(name for name, real in below.items() if real not in holding)  # a link back would have no end
        above |= {os.path.join(folder, name): holding | {below[name]} for name in subfolders}
        transcripts: dict[str, str] = {}
        words: dict[str, list[Word] | None] = {}
        for name in names:
            if name.endswith(".trans.txt"):
                transcripts |= {stem: text for stem, _, text in (line.partition(" ") for line in _lines(Path(folder, name)))}
            if name.endswith(".alignment.txt"):
                words |= _read_word_ends(Path(folder, name))
        for name in sorted(names):
            path = Path(folder, name)
            if is_tar(path) and not name.startswith(".") and path.is_file():
                tars.append(path)
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            relative = path.relative_to(root)
            candidate = Candidate(prefix + relative.with_suffix("").as_posix(), str(path), relative.as_posix(), str(path))
            if path.stem in transcripts:
                candidate.text, candidate.speaker = transcripts[path.stem], path.stem.split("-")[0]
            elif path.with_suffix(".txt").is_file():
                candidate.text = " ".join(_lines(path.with_suffix(".txt"))).strip()
            candidate.words = words.get(path.stem)
            candidates.append(candidate)
    if candidates:  # the archive that a corpus came in often lies beside it
        tars = [path for path in tars if path.suffix == ".tar"]
    packed = []
    loose = {os.path.splitext(candidate.path)[0]: candidate.path for candidate in candidates}
    for path in tars:
        members = _read_tar(path, root, prefix)
        _refuse_unpacked(path, root, members, loose)
        packed += members
    return candidates + packed


def _read_word_ends(path: Path) -> dict[str, list[Word] | None]:
    """Words by utterance from lines of WORD_ENDS: words, silences empty, and when each ends. A file that begins otherwise is not
    LibriSpeech's, and nothing is read from it."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        if not WORD_ENDS.fullmatch(file.readline().rstrip("\n")):
            return {}
    found = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        match = WORD_ENDS.fullmatch(line)
        if match is None or match[2].count(",") != match[3].count(","):
            raise ValueError(f'{path} line {number}: expected ID ",WORD,..." "END,...", a time for each word, got {line[:80]!r}')
        try:
            ends = [float(end) for end in match[3].split(",")]
        except ValueError:
            raise ValueError(f"{path} line {number}: not all of {match[3][:80]!r} are seconds") from None
        triples = list(zip([0.0, *ends[:-1]], ends, match[2].split(","), strict=True))
        found[match[1]] = _words(triples, f"{path} line {number}")
    return found


def _refuse_unpacked(tar: Path, root: Path, members: list[Candidate], loose: dict[str, str]) -> None:
    """A tar beside the files that came out of it would count them twice: a ValueError where one member has a file of its name.

    `loose` are recordings by path without suffix. Files lie where tar puts them: beside it, below the root, or in a folder of its
    name.
    """
    shard = tar.relative_to(root).with_suffix("")
    for member in members:
        key = os.path.splitext(os.path.relpath(member.relative, shard))[0]
        for folder in (tar.parent, root, tar.with_suffix("")):
            if twin := loose.get(os.path.join(folder, key)):
                raise ValueError(
                    f"{member.origin}: {twin} has its name, as if the tar had been unpacked beside its files, and would count twice; "
                    "move one of them away, or give one of them as the source"
                )


def _read_tar(path: Path, base: Path, prefix: str) -> list[Candidate]:
    require_uncompressed(path)
    shard = Path(os.path.abspath(path)).relative_to(os.path.abspath(base)).with_suffix("").as_posix()
    candidates: list[Candidate] = []
    texts: dict[str, str] = {}
    about: dict[str, _About] = {}
    wrong: dict[str, str] = {}  # by stem, with what lies beside a recording
    counts: Counter[str] = Counter()
    for name, member, problem in list_members(path):
        stem, suffix = os.path.splitext(name)
        origin = f"{path}, member {name}"
        counts[name] += 1
        if not name:
            candidates.append(Candidate(prefix + shard, str(path), shard, str(path), problem=problem))
        elif suffix.lower() in SUFFIXES and not os.path.basename(name).startswith("."):
            relative = f"{shard}/{name}"
            candidates.append(Candidate(f"{prefix}{shard}/{stem}", str(path), relative, origin, member=member, problem=problem))
        elif suffix in (".txt", ".json"):
            if problem is None and member.size > LARGEST_TEXT:
                problem = f"has {member.size} bytes, more than any transcript"
            if problem is not None:
                wrong[stem] = f"{name} beside it {problem}"
            elif counts[name] > 1:
                wrong[stem] = f"{name} beside it is in the tar more than once"
            elif suffix == ".txt":
                texts[stem] = " ".join(_decode(read_member(path, member), origin).split("\n")).strip()
            else:
                about[stem] = _parse(_About, read_member(path, member), origin)
    for candidate in candidates:
        inside = candidate.relative.removeprefix(shard + "/")
        stem = os.path.splitext(inside)[0]
        # WebDataset's key ends at the first dot: `7.mic1.flac` and `7.json` are one sample.
        names = (stem, os.path.join(os.path.dirname(stem), os.path.basename(stem).partition(".")[0]))
        if candidate.member is not None and counts[inside] > 1:
            candidate.problem = candidate.problem or f"its name {inside} is in the tar {counts[inside]} times; which one is meant?"
        candidate.problem = candidate.problem or next((wrong[name] for name in names if name in wrong), None)
        found = next((about[name] for name in names if name in about), _About())
        candidate.text = next((texts[name] for name in names if name in texts), found.text)
        candidate.speaker, candidate.split = found.speaker, found.split
        candidate.phones, candidate.words = _phones(found.phones, candidate.origin), _words(found.words, candidate.origin)
    return candidates


def _read_tsv(path: Path, prefix: str) -> list[Candidate]:
    root, *lines = _lines(path)
    transcripts: list[str] | None = _lines(path.with_suffix(".wrd")) if path.with_suffix(".wrd").is_file() else None
    if transcripts is not None and len(transcripts) != len(lines):
        raise ValueError(f"{path.with_suffix('.wrd')}: {len(transcripts)} transcripts for the {len(lines)} rows of {path.name}")
    candidates = []
    for row, line in enumerate(lines):
        match = re.fullmatch(r"(.+)\t([0-9]{1,18})", line)
        if match is None:
            raise ValueError(f"{path} line {row + 2}: expected path<TAB>samples, got {line!r}")
        audio = os.path.join(root, match[1])
        name = prefix + os.path.splitext(match[1])[0]
        candidate = Candidate(name, audio, match[1], f"{path} line {row + 2}", num_samples=int(match[2]))
        candidate.text = transcripts[row] if transcripts else None
        candidates.append(candidate)
    return candidates


Triples = list[tuple[Annotated[FiniteFloat, Field(ge=0)], FiniteFloat, str]]


class _About(BaseModel, coerce_numbers_to_str=True):
    text: str | None = None
    speaker: str | None = None
    split: str | None = None
    phones: Triples | None = None
    words: Triples | None = None


class _AudioRow(_About):
    audio_filepath: str
    id: str | None = None
    offset: Annotated[FiniteFloat, Field(ge=0)] | None = None
    duration: Annotated[FiniteFloat, Field(gt=0)] | None = None


class _AlignmentRow(BaseModel, coerce_numbers_to_str=True):
    id: str
    phones: Triples | None = None
    words: Triples | None = None


def _read_json_lines(path: Path, prefix: str) -> list[Candidate]:
    candidates = []
    base = os.path.abspath(path.parent)
    for origin, row in _parse_lines(path, _AudioRow):
        audio = os.path.abspath(path.parent / row.audio_filepath)
        times = _phones(row.phones, origin), _words(row.words, origin)
        candidates.append(
            Candidate(row.id or "", audio, "", origin, row.speaker, row.text, row.split, *times, row.offset or 0.0, row.duration)
        )
    # Ids are relative to the list's folder, or to what all paths share when some lie elsewhere; segments add their start.
    if not all(candidate.path.startswith(os.path.join(base, "")) for candidate in candidates):
        base = os.path.commonpath({os.path.dirname(candidate.path) for candidate in candidates})
    repeated = {path for path, count in Counter(candidate.path for candidate in candidates).items() if count > 1}
    for candidate in candidates:
        candidate.relative = os.path.relpath(candidate.path, base)
        segment = f"-{candidate.offset_seconds:.3f}" if candidate.path in repeated else ""
        candidate.id = candidate.id or prefix + os.path.splitext(candidate.relative)[0] + segment
    return candidates


def attach_alignments(candidates: list[Candidate], path: str) -> None:
    """Add phones, words or both by utterance id from JSON lines `{"id", "phones": [[start, end, phone], ...], "words": [...]}`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such alignments")
    alignments: dict[str, tuple[list[Phone] | None, list[Word] | None]] = {}
    for origin, row in _parse_lines(Path(path), _AlignmentRow):
        if row.phones is None and row.words is None:
            raise ValueError(f"{origin}: neither 'phones' nor 'words' of {row.id!r}")
        alignments[row.id] = _phones(row.phones, origin), _words(row.words, origin)
    if alignments.keys().isdisjoint(candidate.id for candidate in candidates):
        raise ValueError(f"{path}: none of its {len(alignments)} ids is among the utterances, such as {candidates[0].id!r}")
    for candidate in candidates:
        phones, words = alignments.get(candidate.id, (None, None))
        candidate.phones = candidate.phones if phones is None else phones
        candidate.words = candidate.words if words is None else words


def _phones(triples: Triples | None, origin: str) -> list[Phone] | None:
    return None if triples is None else [Phone(*triple) for triple in _in_order(triples, origin, "phone")]


def _words(triples: Triples | None, origin: str) -> list[Word] | None:
    """Aligners write pauses as words without a name: those are left out."""
    if triples is None:
        return None
    words = [Word(start, end, name.strip()) for start, end, name in _in_order(triples, origin, "word") if name.strip()]
    for word in words:
        if len(word.word.split()) > 1:
            raise ValueError(f"{origin}: word {word.word!r} at {word.start} s is several words; give each its own time")
    return words


def _in_order(triples: Triples, origin: str, kind: str) -> Triples:
    """In order and without overlap beyond 1 ms of rounding, or a ValueError."""
    triples = sorted(triples)
    for (start, end, name), following in pairwise([*triples, (math.inf, math.inf, "")]):
        if end < start or end > following[0] + 0.001:
            raise ValueError(f"{origin}: {kind} {name!r} at {start} s ends before it starts or overlaps the next")
    return triples


def _parse_lines(path: Path, row_class: type[Row]) -> Iterator[tuple[str, Row]]:
    """(origin, row) for each line that is not blank; the first mistake is a ValueError naming the line, key and remedy."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield (origin := f"{path} line {number}"), _parse(row_class, line, origin)


def _parse(row_class: type[Row], text: str | bytes, origin: str) -> Row:
    try:
        return row_class.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "missing" or key not in row_class.model_fields:
        got = repr(problem["input"])
        raise ValueError(f"{origin}: {key + ': ' if key else ''}{problem['msg']}, got {got[:80]}")
    near = difflib.get_close_matches(key, problem["input"], n=1)
    hint = f"did you mean it by {near[0]!r}?" if near else f"it has {', '.join(problem['input']) or 'no keys'}"
    raise ValueError(f"{origin}: no {key!r}; {hint}")


def _lines(path: Path) -> list[str]:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no file")
    return _decode(path.read_bytes(), str(path)).removesuffix("\n").split("\n")


def _decode(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8 text ({error})") from None


def require_distinct_ids(candidates: list[Candidate]) -> None:
    """Two rows under one id are a ValueError naming both, unless one of them cannot be used anyway."""
    seen: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.problem is not None:
            continue
        other = seen.setdefault(candidate.id, candidate)
        if other is not candidate:
            raise ValueError(
                f"id {candidate.id!r} names both {other.origin} and {candidate.origin}; ids must differ. "
                "Give `id` in JSON lines, rename a source, or index a folder that holds both"
            )


def name_speakers(candidates: list[Candidate], pattern: str) -> None:
    """Read the speaker off each relative path: the regular expression's group `speaker`, or its first."""
    compiled = re.compile(pattern)
    group: str | int = "speaker" if "speaker" in compiled.groupindex else 1
    for candidate in candidates:
        if candidate.problem is not None:
            continue
        match = compiled.search(candidate.relative)
        if match is None or not match[group]:
            raise ValueError(f"speaker_pattern {pattern!r} names no speaker in {candidate.relative!r}")
        candidate.speaker = match[group]
