"""`index`: take what a source of audio claims (see `pretrain.data.sources.sources`), examine every recording,
draw splits, write a manifest.

Recordings that cannot be used are listed with the reason and left out, unless there are too many of them.
"""

import os
import re
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator
from rich.markup import escape
from rich.table import Table

from pretrain.config import Config, PathStr, PathStrs, Seed
from pretrain.data.manifest import write_manifest
from pretrain.data.probing import Limits, Probed, Request, probe_recordings
from pretrain.data.sources.candidates import Candidate
from pretrain.data.sources.cutting import Found, cut, cuts_in_words
from pretrain.data.sources.lists import attach_alignments
from pretrain.data.sources.sources import (
    describe_passed_over,
    describe_twins,
    name_speakers,
    read_sources,
    require_distinct_ids,
)
from pretrain.data.splits import Split, draw_splits, notes_on_splits
from pretrain.progress import console, progress
from pretrain.store.artefact import is_complete, read_meta, require_absent

Share = Annotated[float, Field(ge=0, lt=1)]


class IndexConfig(Config):
    """What to index: a source or a list of them (see `pretrain.data.sources.sources`). `speaker_pattern` is
    searched in each path relative to the source; its group `speaker`, or else its first group, is the
    speaker. `alignments` are JSON lines {"id", "phones": [[start, end, phone], ...], "words": [[start, end,
    word], ...]}, either or both, for utterances by id. `dev_share` and `test_share` are shares of the hours
    (see `pretrain.data.splits`). Recordings are examined in `workers` processes; one that takes more memory
    there, or more of the processor's time than `seconds_limit` and five seconds for each MB of it, is left
    out, as are others that cannot be used."""

    source: Annotated[PathStrs, Field(min_length=1)]
    out: PathStr
    speaker_pattern: str | None = None
    alignments: PathStr | None = None
    dev_share: Share = 0.1
    test_share: Share = 0.1
    split_seed: Seed = 0
    verify: Literal["decode", "header"] = "decode"
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    workers: Annotated[int, Field(ge=0)] = 0  # processes; 0: one for each core
    memory_limit_gb: Annotated[float, Field(ge=0.1)] = 1.0  # of a worker; decoding takes a hundredth of it
    seconds_limit: Annotated[float, Field(gt=0)] = 60.0
    max_seconds: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="longer recordings are cut into utterances of like length (see "
        "`pretrain.data.sources.cutting`)",
    )

    @field_validator("speaker_pattern")
    @classmethod
    def _names_a_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and re.compile(pattern).groups == 0:
                raise ValueError(f"{pattern!r} has no group; write for example '(?P<speaker>[^/]+)/'")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def named(self) -> str:
        """The sources, for messages."""
        return ", ".join(self.sources)

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.dev_share + self.test_share >= 1:
            raise ValueError(
                f"dev_share {self.dev_share} and test_share {self.test_share} leave nothing to train on"
            )
        return self


def index(config: IndexConfig) -> dict[str, Any]:
    """Write the manifest of `config.source`; the summary counts what was found, kept and quarantined, in all
    and by split."""
    require_absent(config.out)
    passed_over: list[str] = []
    candidates = read_sources(config.sources, passed_over)
    for note in (describe_passed_over(passed_over) if passed_over else None, describe_twins(candidates)):
        if note is not None:
            console.print(f"{config.named}: {note}", markup=False, highlight=False, soft_wrap=True)
    require_distinct_ids(candidates)
    if config.speaker_pattern is not None:
        name_speakers(candidates, config.speaker_pattern)
    if config.alignments is not None:
        attach_alignments(candidates, config.alignments)
    found, quarantine = _verify(candidates, config)
    _report_quarantine(quarantine, len(candidates), config)
    assert len(found) + len(quarantine) == len(candidates)
    whole = found
    # too few to draw splits from: their pieces are drawn
    if len(found) <= (config.dev_share > 0) + (config.test_share > 0):
        found = cut(found, config.max_seconds)
    drawn = _split(found, config)
    found = cut(found, config.max_seconds)
    note = cuts_in_words(whole, found)
    notes = [*drawn.notes, *([note] if note else [])]
    root = os.path.commonpath({os.path.dirname(os.path.abspath(candidate.path)) for candidate in candidates})
    write_manifest(
        config.out,
        map(_row, found),
        config.resolved(),
        _parents(config.sources),
        quarantine,
        root,
        splits_drawn_by=drawn.by,
        split_notes=drawn.notes,
    )
    splits = sorted({candidate.split or "" for candidate, _ in found})
    return {
        "found": len(candidates),
        "quarantined": len(quarantine),
        **({"passed_over": len(passed_over)} if passed_over else {}),
        **_count(found),
        "splits": {split: _count([pair for pair in found if pair[0].split == split]) for split in splits},
        "splits_drawn_by": drawn.by,
        "has_text": any(candidate.text is not None for candidate, _ in found),
        "has_phones": any(candidate.phones is not None for candidate, _ in found),
        "has_words": any(candidate.words is not None for candidate, _ in found),
        **({"notes": notes} if notes else {}),
    }


def _count(found: list[Found]) -> dict[str, Any]:
    return {
        "utterances": len(found),
        "hours": sum(num_samples / sample_rate for _, (_, num_samples, sample_rate) in found) / 3600,
        "speakers": len({candidate.speaker for candidate, _ in found} - {None}),
    }


def _row(found: Found) -> dict[str, Any]:
    candidate, (start, num_samples, sample_rate) = found
    return {
        "id": candidate.id,
        "path": candidate.path,
        "start": start,
        "num_samples": num_samples,
        "sample_rate": sample_rate,
        "member_offset": candidate.member and candidate.member.offset,
        "member_size": candidate.member and candidate.member.size,
        "split": candidate.split,
        "speaker": candidate.speaker,
        "text": candidate.text,
        "phones": candidate.phones,
        "words": candidate.words,
    }


def _parents(sources: list[str]) -> dict[str, str]:
    """The fingerprints of sources that are files of an artefact, such as `speech.jsonl`, by their place among
    the sources."""
    files = {"source" + (f"_{n}" if n else ""): Path(source) for n, source in enumerate(sources)}
    return {
        name: read_meta(file.parent)["fingerprint"]
        for name, file in files.items()
        if file.is_file() and is_complete(file.parent)
    }


def _verify(candidates: list[Candidate], config: IndexConfig) -> tuple[list[Found], list[dict[str, Any]]]:
    """Examine every recording with a few processes: (usable ones, quarantine), both in the candidates'
    order."""
    results: list[Probed | str | None] = [candidate.problem for candidate in candidates]
    promising = [place for place, problem in enumerate(results) if problem is None]
    requests = (_request(candidates[place], config) for place in promising)
    num_workers = config.workers or len(os.sched_getaffinity(0))
    answers = probe_recordings(
        requests, len(promising), num_workers, Limits(config.memory_limit_gb, config.seconds_limit)
    )
    with closing(answers), progress("index", len(promising), "file") as advance:
        for number, answer in answers:
            results[promising[number]] = answer
            advance(1)
    usable: list[Found] = []
    quarantine: list[dict[str, Any]] = []
    for candidate, found in zip(candidates, results, strict=True):
        assert found is not None, "every request is answered"
        problem = found if isinstance(found, str) else _misaligned(candidate, found[1] / found[2])
        if problem is not None:
            quarantine.append(
                {"id": candidate.id, "path": os.path.abspath(candidate.path), "reason": problem}
            )
        else:
            assert not isinstance(found, str)
            usable.append((candidate, found))
    return usable, quarantine


def _request(candidate: Candidate, config: IndexConfig) -> Request:
    segment = candidate.offset_seconds, candidate.duration_seconds
    return Request(
        candidate.path, *segment, candidate.num_samples, config.verify == "decode", candidate.member
    )


def _misaligned(candidate: Candidate, duration_seconds: float) -> str | None:
    """What is wrong when phones or words go on after the recording, whose duration aligners round: they are
    of another one."""
    for kind, times in (("phone", candidate.phones), ("word", candidate.words)):
        if times and times[-1].end > duration_seconds + 0.1:
            start, end, name = times[-1]
            return (
                f"{kind} {name!r} at {start} s ends at {end} s, after the recording ({duration_seconds:.3f} "
                "s)"
            )
    return None


def _report_quarantine(quarantine: list[dict[str, Any]], num_found: int, config: IndexConfig) -> None:
    """A table on stderr; a ValueError when more than `max_bad_share` of the recordings, or all of them, are
    bad."""
    if not quarantine:
        return
    if len(quarantine) == num_found or len(quarantine) > config.max_bad_share * num_found:
        worst = "".join(f"\n  {row['path']}: {row['reason']}" for row in quarantine[:5])
        more = f"\n  and {len(quarantine) - 5} more" if len(quarantine) > 5 else ""
        remedy = (
            ""
            if len(quarantine) == num_found
            else f" (max_bad_share is {config.max_bad_share}; raise it to go on without them)"
        )
        raise ValueError(
            f"{config.named}: {len(quarantine)} of {num_found} recordings cannot be "
            f"used{remedy}:{worst}{more}"
        )
    table = Table(
        "recording",
        "reason",
        title=f"{len(quarantine)} of {num_found} recordings left out (all in quarantine.jsonl)",
    )
    for row in quarantine[:20]:
        table.add_row(escape(row["path"]), escape(row["reason"]))
    console.print(table)


# Drawing splits


class Drawn(NamedTuple):
    """How the splits came about: by "speaker" or "utterance", from the "source", or "none" where all is
    train; and notes on them."""

    by: str
    notes: list[str]


def _split(found: list[Found], config: IndexConfig) -> Drawn:
    """Fill in `split` unless the source gave it: by speaker when three or more are known, otherwise by
    utterance.

    Utterances of unknown speakers stay in train when the split is by speaker.
    """
    candidates = [candidate for candidate, _ in found]
    without = [candidate.id for candidate in candidates if candidate.split is None]
    if len(without) < len(candidates):
        if without:
            raise ValueError(
                f"{config.named}: {without[0]!r} has no split though others do; give one to all rows or to "
                "none"
            )
        return Drawn("source", [])
    num_speakers = len({candidate.speaker for candidate in candidates} - {None})
    by = "speaker" if num_speakers >= 3 else "utterance"
    names = [candidate.speaker if by == "speaker" else candidate.id for candidate in candidates]
    lengths = [num_samples / sample_rate for _, (_, num_samples, sample_rate) in found]
    seconds, of_strangers = dict[str, float](), 0.0
    for name, length in sorted(zip(names, lengths, strict=True), key=lambda pair: (pair[0] or "", pair[1])):
        if name is None:
            of_strangers += length
        else:
            # in this order, so that rounding does not depend on that of the rows
            seconds[name] = seconds.get(name, 0.0) + length
    splits = [
        Split(name, share)
        for name, share in (("test", config.test_share), ("dev", config.dev_share))
        if share > 0
    ]
    try:
        drawn = draw_splits(seconds, splits, config.split_seed, of_strangers)
    except ValueError as error:
        raise ValueError(f"{config.named}: {error}") from None
    for candidate, name in zip(candidates, names, strict=True):
        candidate.split = "train" if name is None else drawn[name]
    if not splits:
        return Drawn("none", [])
    totals: dict[str, float] = {}
    for candidate, length in zip(candidates, lengths, strict=True):
        totals[str(candidate.split)] = totals.get(str(candidate.split), 0.0) + length
    return Drawn(
        by,
        [
            *notes_on_splits(totals, splits, by),
            *_notes_on_voices(by, num_speakers, names.count(None), splits),
        ],
    )


def _notes_on_voices(by: str, num_speakers: int, num_strangers: int, splits: list[Split]) -> list[str]:
    """Whether voices that are tested may have been heard in training."""
    held_out = " and ".join(split.name for split in splits)
    name_them = (
        "name them with speaker_pattern (such as '^([^/]+)/' for a folder each) or `speaker` in JSON lines"
    )
    if by == "utterance":
        known = (
            f"only {num_speakers} of them {'is' if num_speakers == 1 else 'are'} known"
            if num_speakers
            else "none is known"
        )
        return [
            f"splits are drawn by utterance, not by speaker ({known}): voices of {held_out} may be heard in "
            f"training; {name_them}"
        ]
    if num_strangers:
        return [
            f"{num_strangers} utterances have no speaker and are in train: voices of {held_out} may be among "
            f"them; {name_them}"
        ]
    return []
