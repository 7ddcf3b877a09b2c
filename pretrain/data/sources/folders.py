"""A folder of recordings, with LibriSpeech's transcripts and alignments, texts beside recordings, and tars.

What cannot be read (a folder, a member of a tar, a transcript that is no text) becomes the `problem` of a
candidate and ends nothing. A compressed tar is refused: its recordings cannot be read in place, and nobody
would miss them.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.sources.candidates import OTHER_SUFFIXES, SUFFIXES, Candidate, Names, as_words
from pretrain.data.sources.tar import is_tar, read_tar
from pretrain.data.utterance import Word
from pretrain.store.plain_text import decode_line, joined_lines, raw_lines, read_text

# A line of LibriSpeech's alignments: `84-1-0000 ",GO,DO," "0.49,0.89,1.27,1.61"`.
WORD_ENDS = re.compile(r'(\S+) "([^"]*)" "([\d.,]*)"')


@dataclass(slots=True)
class _Beside:
    """What LibriSpeech's files of one folder have about its recordings, by stem; the problem where a line
    cannot be used."""

    texts: dict[str, str] = field(default_factory=dict)
    words: dict[str, list[Word] | None] = field(default_factory=dict)
    text_problems: dict[str, str] = field(default_factory=dict)
    word_problems: dict[str, str] = field(default_factory=dict)
    unread_texts: str | None = None  # why a whole file of transcripts cannot be used
    unread_words: str | None = None


def read_folder(root: Path, prefix: str, passed_over: list[str]) -> list[Candidate]:
    """Every recording beneath `root`, and those of its tars. Recordings that libsndfile does not read are
    added to `passed_over`."""
    candidates: list[Candidate] = []
    tars: list[Path] = []
    for folder, names in _walk(root, prefix, candidates):
        beside = _read_beside(folder, names)
        present, stems = set(names), set()
        for name in sorted(names):
            path = folder / name
            if name.startswith("."):
                continue
            if is_tar(path) and _is_regular(path):
                tars.append(path)
            if path.suffix.lower() in OTHER_SUFFIXES:
                passed_over.append(str(path))
            if path.suffix.lower() in SUFFIXES:
                stems.add(path.stem)
                candidates.append(_candidate(path, root, beside, present))
        relative = folder.relative_to(root)
        for stem, problem in beside.word_problems.items():
            if stem not in stems:  # a line about no recording that is here, perhaps because its id is damaged
                name = (relative / stem).as_posix()
                candidates.append(Candidate(prefix + name, str(folder), name, str(folder), problem=problem))
    names_of = Names([candidate.relative for candidate in candidates if not candidate.id])
    for candidate in candidates:
        if not candidate.id:
            candidate.id = prefix + names_of[candidate.relative]
            candidate.has_twin = names_of.has_twin(candidate.relative)
    if candidates:  # the archive that a corpus came in often lies beside it
        tars = [path for path in tars if path.suffix == ".tar"]
    packed = []
    loose = {os.path.splitext(candidate.path)[0]: candidate.path for candidate in candidates}
    for path in tars:
        members = read_tar(path, root, prefix, passed_over)
        _refuse_unpacked(path, root, members, loose)
        packed += members
    return candidates + packed


def _walk(root: Path, prefix: str, unread: list[Candidate]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files), in order, following links; a folder that cannot be read is added to
    `unread`."""

    def note(error: OSError) -> None:
        relative = os.path.relpath(error.filename, root)
        name = prefix + relative if relative != "." else prefix.removesuffix("/") or root.name or "."
        problem = f"is a folder that cannot be read ({error.strerror}); make it readable, or move it away"
        unread.append(Candidate(name, error.filename, relative, error.filename, problem=problem))

    above = {str(root): {os.path.realpath(root)}}  # what a folder lies in, by way of links
    for folder, subfolders, names in os.walk(root, onerror=note, followlinks=True):
        holding = above.pop(folder)
        below = {
            name: os.path.realpath(os.path.join(folder, name))
            for name in subfolders
            if not name.startswith(".")
        }
        # a link back would have no end
        subfolders[:] = sorted(name for name, real in below.items() if real not in holding)
        above |= {os.path.join(folder, name): holding | {below[name]} for name in subfolders}
        yield Path(folder), names


def _candidate(path: Path, root: Path, beside: _Beside, present: set[str]) -> Candidate:
    """A recording with what lies beside it, without its id."""
    candidate = Candidate("", str(path), path.relative_to(root).as_posix(), str(path))
    candidate.problem = beside.text_problems.get(path.stem) or beside.word_problems.get(path.stem)
    text = path.with_suffix(".txt")
    if path.stem in beside.texts:
        candidate.text, candidate.speaker = beside.texts[path.stem], path.stem.split("-")[0]
    elif text.name in present and _is_regular(text):
        try:
            candidate.text = joined_lines(read_text(text))
        except (OSError, ValueError) as error:
            candidate.problem = candidate.problem or _reason(text, error)
    else:
        candidate.problem = candidate.problem or beside.unread_texts
    candidate.words = beside.words.get(path.stem)
    if candidate.words is None:
        candidate.problem = candidate.problem or beside.unread_words
    return candidate


def _is_regular(path: Path) -> bool:
    """A file and no pipe, which would be waited for; also where nobody can look, so that opening it gives the
    reason."""
    with suppress(OSError):
        return stat.S_ISREG(path.stat().st_mode)
    return os.path.lexists(path)


def _reason(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def _read_beside(folder: Path, names: list[str]) -> _Beside:
    """What LibriSpeech's files of a folder have."""
    beside = _Beside()
    for name in sorted(names):
        path = folder / name
        if not name.endswith((".trans.txt", ".alignment.txt")):
            continue
        if not _is_regular(path):
            if name.endswith(".trans.txt"):
                raise ValueError(f"{path}: is no file")
            continue
        try:
            with open(path, "rb") as file:
                if name.endswith(".trans.txt"):
                    _read_transcripts(path, raw_lines(file, str(path)), beside)
                else:
                    _read_word_ends(path, raw_lines(file, str(path)), beside)
        except (OSError, ValueError) as error:
            if name.endswith(".trans.txt"):
                beside.unread_texts = _reason(path, error)
            elif isinstance(error, OSError):  # what is no text is no alignment of LibriSpeech's
                beside.unread_words = _reason(path, error)
    return beside


def _read_transcripts(path: Path, lines: Iterator[bytes], beside: _Beside) -> None:
    """`STEM TRANSCRIPT` in each line."""
    for number, raw in enumerate(lines, start=1):
        try:
            stem, _, text = decode_line(raw, f"{path} line {number}").partition(" ")
            beside.texts[stem] = text
        except ValueError as error:
            beside.text_problems[_stem(raw)] = str(error)


def _read_word_ends(path: Path, lines: Iterator[bytes], beside: _Beside) -> None:
    """Words by utterance from lines of WORD_ENDS: words, silences empty, and when each ends. A file that
    begins otherwise is not LibriSpeech's, and nothing is read from it."""
    for number, raw in enumerate(lines, start=1):
        if number == 1 and not WORD_ENDS.fullmatch(raw.decode("utf-8", errors="replace")):
            return
        if raw.strip():
            try:
                stem, triples = _word_ends(decode_line(raw, f"{path} line {number}"), f"{path} line {number}")
                beside.words[stem] = as_words(triples, f"{path} line {number}")
            except ValueError as error:
                beside.word_problems[_stem(raw)] = str(error)


def _word_ends(line: str, origin: str) -> tuple[str, list[tuple[float, float, str]]]:
    match = WORD_ENDS.fullmatch(line)
    if match is None or match[2].count(",") != match[3].count(","):
        raise ValueError(
            f'{origin}: expected ID ",WORD,..." "END,...", a time for each word, got {line[:80]!r}'
        )
    try:
        ends = [float(end) for end in match[3].split(",")]
    except ValueError:
        raise ValueError(f"{origin}: not all of {match[3][:80]!r} are seconds") from None
    return match[1], list(zip([0.0, *ends[:-1]], ends, match[2].split(","), strict=True))


def _stem(line: bytes) -> str:
    """What a line that cannot be used is about."""
    return line.partition(b" ")[0].decode("utf-8", errors="replace")


def _refuse_unpacked(tar: Path, root: Path, members: list[Candidate], loose: dict[str, str]) -> None:
    """A tar beside the files that came out of it would count them twice: a ValueError where one member has a
    file of its name.

    `loose` are recordings by path without suffix. Files lie where tar puts them: beside it, below the root,
    or in a folder of its name.
    """
    shard = tar.relative_to(root).with_suffix("")
    for member in members:
        key = os.path.splitext(os.path.relpath(member.relative, shard))[0]
        for folder in (tar.parent, root, tar.with_suffix("")):
            if twin := loose.get(os.path.join(folder, key)):
                raise ValueError(
                    f"{member.origin}: {twin} has its name, as if the tar had been unpacked beside its "
                    "files, and would count twice; move one of them away, or give one of them as the source"
                )
