"""What a source of audio claims: one `Candidate` per utterance, before any recording is opened.

A source is one of
- a folder: every wav, flac, ogg, mp3, opus and NIST sphere beneath it, and what else libsndfile reads
  (`SUFFIXES` of `pretrain.data.sources.candidates`). Transcripts come from LibriSpeech's `*.trans.txt` (which
  also name the speaker) or from `X.txt` beside `X.wav`, word times from the `*.alignment.txt` of
  LibriSpeech's alignments;
- a fairseq `.tsv`: the root on the first line, then `path<TAB>samples`; a `.wrd` file of the same name holds
  transcripts;
- JSON lines (`.jsonl` or NeMo's `.json`): `audio_filepath` and, where known, `id`, `text`, `speaker`,
  `split`, `offset` and `duration` in seconds, and `phones` and `words` as [start, end, name]; other keys are
  ignored. Relative paths start at the file's folder;
- an uncompressed `.tar`, read in place (see `pretrain.data.sources.tar`); those beneath a folder are found
  too;
- a glob such as `shards/*.tar` of any of these, or a list of sources.

An id, where none is given, is the path below the folder without its suffix, for a member of a tar the tar's
path, a slash and the member's. Recordings that differ in their suffix alone keep it. With several sources the
source's own name comes first, so that equal names in two corpora stay apart.

Text is UTF-8, with or without a byte-order mark, or UTF-16 with one. What cannot be read of a list ends the
reading; what cannot be read beside a recording, or of a folder, is the `problem` of a candidate.
"""

import glob
import os
import re
from collections import Counter
from pathlib import Path

from pretrain.data.sources.candidates import SUFFIXES, Candidate
from pretrain.data.sources.folders import read_folder
from pretrain.data.sources.lists import read_json_lines, read_tsv
from pretrain.data.sources.tar import is_tar, read_tar

# Python has a surrogate for each byte of a file's name that is not UTF-8
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def read_sources(sources: list[str], passed_over: list[str] | None = None) -> list[Candidate]:
    """What the sources list, unverified. One that does not exist, is of no known kind or holds no audio is a
    ValueError.

    Recordings that are not read here, such as `x.m4a`, are added to `passed_over`.
    """
    found: list[Candidate] = []
    for source in sources:
        prefix = _prefix(Path(os.path.abspath(source))) if len(sources) > 1 else ""
        others: list[str] = []
        found += _read_source(source, prefix, others)
        if passed_over is not None:
            passed_over += others
    for candidate in found:
        _refuse_names(candidate)
    return found


def _refuse_names(candidate: Candidate) -> None:
    """Ids are written into tables and lists, a line each: one that is no line of UTF-8 is a problem, and so
    is such a path.

    Both are kept with escapes in place of what they may not hold.
    """
    for which, name in (("id", candidate.id), ("path", candidate.path)):
        if _UNFIT.search(name):
            plain = _UNFIT.sub(lambda match: ascii(match[0])[1:-1], name)
            candidate.problem = (
                candidate.problem
                or f"has the {which} '{plain}', with control characters or no UTF-8; rename it"
            )
            setattr(candidate, which, plain)


def _prefix(path: Path) -> str:
    """What keeps the ids of several sources apart; those of tars begin with the tar's name anyway."""
    return "" if is_tar(path) or glob.has_magic(path.name) else _without_suffix(path, path.name) + "/"


def _without_suffix(path: Path, name: str) -> str:
    """`name` without its suffix where `path` is a file; a folder such as `cv-1.0` has none."""
    return os.path.splitext(name)[0] if path.is_file() else name


def describe_passed_over(names: list[str]) -> str:
    """How many recordings of which suffix are not read, one of them, and the remedy."""
    counts = Counter(os.path.splitext(name)[1].lower() for name in names)
    by_suffix = ", ".join(f"{suffix} {count}" for suffix, count in sorted(counts.items()))
    suffix, plural = os.path.splitext(names[0])[1], "s" if len(names) > 1 else ""
    return (
        f"{len(names)} recording{plural} passed over, which cannot be read here ({by_suffix}), such as "
        f"{names[0]}; convert them first, for example: ffmpeg -i x{suffix} x.flac"
    )


def describe_twins(candidates: list[Candidate]) -> str | None:
    """How many recordings share their name but for the suffix, and two of them; None where there are none."""
    twins = [candidate for candidate in candidates if candidate.has_twin]
    if not twins:
        return None
    stem = os.path.splitext(twins[0].origin)[0]
    pair = [twin.origin for twin in twins if os.path.splitext(twin.origin)[0] == stem][:2]
    return (
        f"{len(twins)} recordings have a name that another has with another suffix, such as "
        f"{' and '.join(pair)}; their ids keep the suffix. If these are the same speech in two formats, it "
        "counts twice: index one of them alone"
    )


def _read_source(source: str, prefix: str, passed_over: list[str]) -> list[Candidate]:
    """`prefix` comes before every id that the source does not give itself."""
    path = Path(source)
    if glob.has_magic(source) and not path.exists():
        paths = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
        base = (
            Path(os.path.commonpath([os.path.dirname(os.path.abspath(match)) for match in paths]))
            if paths
            else path
        )
        candidates = []
        for match in paths:
            name = Path(os.path.abspath(match)).relative_to(base)
            own = "" if is_tar(match) else _without_suffix(match, name.as_posix()) + "/"
            candidates += _read_one(match, prefix + own, base, passed_over)
    else:
        candidates = _read_one(path, prefix, path.parent, passed_over)
    if not candidates:
        looked_for = f" (looked for {', '.join(sorted(SUFFIXES))} and .tar)" if path.is_dir() else ""
        others = f"; {describe_passed_over(passed_over)}" if passed_over else ""
        raise ValueError(f"{source}: no audio found{looked_for}{others}")
    return candidates


def _read_one(path: Path, prefix: str, base: Path, passed_over: list[str]) -> list[Candidate]:
    """Of a tar the ids start with its path below `base`."""
    if path.is_dir():
        return read_folder(path, prefix, passed_over)
    if not path.is_file():
        raise ValueError(f"{path}: no such folder or file")
    if is_tar(path):
        return read_tar(path, base, prefix, passed_over)
    if path.suffix == ".tsv":
        return read_tsv(path, prefix)
    if path.suffix in (".jsonl", ".json"):
        return read_json_lines(path, prefix)
    raise ValueError(
        f"{path}: a source is a folder, a .tar, a .tsv, JSON lines (.jsonl or .json), or a glob of them"
    )


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
