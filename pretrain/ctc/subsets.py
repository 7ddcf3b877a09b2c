"""Budgets of labelled speech: which transcripts can be used, a seeded, speaker-balanced draw of them, and the
draw as a manifest.

The draw is a function of the seed, the ids, the speakers and the lengths, whatever the order of the rows, the
machine and the versions of libraries. Within a speaker, utterances come in the order of a hash of seed and
id; among speakers, the next is always of the one with the least audio so far. So a smaller budget lies inside
a larger one of the same seed, drawing from the larger one's manifest gives the same as drawing from the
corpus, and an utterance more or less leaves the order of the others as it is.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.manifest import Manifest, copy_manifest
from pretrain.data.utterance import SAMPLE_RATE
from pretrain.store.artefact import disagreements, is_complete, read_meta

_FORM = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|%)", re.ASCII)
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def amount(budget: str) -> tuple[Fraction, str]:
    """Seconds and "s", or a share and "%"; equal for budgets that ask for the same. ValueError for what is no
    budget."""
    match = _FORM.fullmatch("100%" if budget == "all" else budget)
    if match is None:
        raise ValueError(f"{budget!r} is no budget; write for example 90s, 10min, 1h, 25% or all")
    number, unit = Fraction(match[1]), match[2]
    if number == 0 or (unit == "%" and number > 100):
        raise ValueError(f"{budget!r} is no budget: more than nothing, and at most 100%")
    return (number, "%") if unit == "%" else (number * _SECONDS[unit], "s")


def _require_budget(budget: str) -> str:
    amount(budget)
    return budget


Budget = Annotated[str, AfterValidator(_require_budget)]
"""For configs: 90s, 10min, 1.5h, 25% (of the audio that can be used) or all."""


def targets(manifest: Manifest, text: TextConfig) -> Iterator[tuple[np.ndarray, list[str | None]]]:
    """What each row is to be written as, None where there is no transcript, a row group at a time with the
    rows' numbers."""
    for rows, table in manifest.blocks([text.column]):
        column = table[text.column].combine_chunks()
        if text.spelling != "phones":
            yield rows, [None if value is None else text.normalize(value) for value in column.to_pylist()]
            continue
        # a struct for each phone would take ten times as long
        phones = column.flatten().field("phone").to_pylist()
        ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy()).tolist()
        known = column.is_valid().to_pylist()
        spans = zip([0, *ends], ends, known, strict=False)
        yield (
            rows,
            [text.join_phones(phones[first:last]) if is_known else None for first, last, is_known in spans],
        )


def transcribed(manifest: Manifest, text: TextConfig) -> np.ndarray:
    """Numbers of the rows that have a transcript (or phones), if only an empty one; ascending, int64."""
    chosen = [
        rows[table[text.column].is_valid().to_numpy()] for rows, table in manifest.blocks([text.column])
    ]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))


def examine(
    manifest: Manifest, rows: np.ndarray, text: TextConfig, vocabulary: Vocabulary, frames: np.ndarray
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Which of `rows` can be trained on, in their order, and what is wrong with each other: `id`, `kind` and
    `reason`.

    `frames` (rows,) are the frames a recogniser has for each; CTC needs one for each symbol and one between
    two that are alike. The problems are in the order of the file.
    """
    usable, problems = np.ones(len(rows), bool), []
    chosen = manifest.take(rows)
    identities = (table["id"] for _, table in chosen.blocks(["id"]))
    for (places, block), names in zip(targets(chosen, text), identities, strict=True):
        for index, (place, target) in enumerate(zip(places.tolist(), block, strict=True)):
            if problem := _problem(target, vocabulary, int(frames[place])):
                usable[place] = False
                problems.append({"id": names[index].as_py(), "kind": problem[0], "reason": problem[1]})
    return np.asarray(rows, np.int64)[usable], problems


def _problem(target: str | None, vocabulary: Vocabulary, num_frames: int) -> tuple[str, str] | None:
    """The kind of problem and what it is, or None."""
    if not target:
        return (
            "empty",
            "no transcript" if target is None else "nothing is left of the transcript once it is normalised",
        )
    if unknown := vocabulary.unknown(target):
        return "not in the vocabulary", f"{_short(target)} has {sorted(unknown)}, not in the vocabulary"
    classes = vocabulary.encode(target)
    if vocabulary.spelling == "tokenizer" and (written := vocabulary.decode(classes)) != target:
        return "changed by the tokenizer", f"{_short(target)} is {_short(written)} to the tokenizer"
    needed = (
        len(classes)
        if 2 * len(classes) <= num_frames
        else len(classes) + int((classes[1:] == classes[:-1]).sum())
    )
    if needed > num_frames:
        return (
            "too long",
            f"{len(classes)} symbols need {needed} frames, it has {num_frames}: {_short(target)}",
        )
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def count_problems(problems: Sequence[dict[str, str]]) -> dict[str, int]:
    """How many there are of each kind, the most frequent first."""
    return dict(Counter(problem["kind"] for problem in problems).most_common())


def problems_message(manifest: Manifest, problems: Sequence[dict[str, str]], shown: int = 10) -> str:
    """For an error or a note: how many transcripts cannot be used, of which kinds, and the first of them."""
    counts = ", ".join(f"{count} {kind}" for kind, count in count_problems(problems).items())
    lines = [f"{problem['id']!r}: {problem['reason']}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"and {len(problems) - shown} more")
    return "\n  ".join([f"{manifest.folder}: {len(problems)} transcripts cannot be used ({counts}):", *lines])


def draw_subset(
    manifest: Manifest, rows: np.ndarray, budget: str, seed: int, at_least: str | None = None
) -> np.ndarray:
    """Of `rows`, as drawn, the first that together have the budget: it ends with the utterance that reaches
    it, at most that much over.

    A share is of the audio of `rows`. Speakers have equal audio to within an utterance, as far as theirs
    goes; rows without a speaker count as one speaker. Where there is less than the budget but `at_least` as
    much as that, all of it. ValueError for a budget above what there is otherwise, and for what is none.
    """
    rows = np.asarray(rows, np.int64)
    if budget == "all":
        return rows
    chosen = manifest.take(rows)
    lengths = chosen.lengths
    available = int(lengths.sum())
    wanted = _num_samples(budget, available)
    if at_least is not None and wanted > available >= _num_samples(at_least, available) and available:
        return rows
    if wanted > available or not available:
        usable, there = (samples / (60 * SAMPLE_RATE) for samples in (available, int(manifest.lengths.sum())))
        enough = f" (at least {at_least} would do)" if at_least else ""
        raise ValueError(
            f"{manifest.folder}: budget = {budget!r} is {wanted / (60 * SAMPLE_RATE):.2f} minutes, but only "
            f"{usable:.2f} of the {there:.2f} minutes there have a transcript that can be used{enough}; ask "
            "for less, or for all"
        )
    keys, speakers = _hashes(chosen, seed), _speakers(chosen)[1]
    by_speaker = np.lexsort((keys, speakers))
    first = np.flatnonzero(np.diff(speakers[by_speaker], prepend=-1))  # of each speaker
    sizes = np.diff(first, append=len(rows))
    before = np.cumsum(lengths[by_speaker]) - lengths[by_speaker]
    before -= np.repeat(before[first], sizes)  # what the speaker has had when this utterance's turn comes
    rank = np.repeat(keys[by_speaker][first], sizes)  # whose turn it is first among equals
    drawn = by_speaker[np.lexsort((rank, before))]
    return rows[drawn[: int(np.searchsorted(np.cumsum(lengths[drawn]), wanted)) + 1]]


def _num_samples(budget: str, available: int) -> int:
    """What a budget is of so many samples, rounded up."""
    wanted, unit = amount(budget)
    return math.ceil(wanted * (Fraction(available, 100) if unit == "%" else SAMPLE_RATE))


def _hashes(manifest: Manifest, seed: int) -> np.ndarray:
    """A pseudo-random number of each row, (rows,) uint64, of its id and the seed alone."""
    key = str(seed).encode()
    digests = (
        hashlib.blake2b(name.encode(), digest_size=8, key=key).digest()
        for chunk in manifest.column("id").chunks
        for start in range(0, len(chunk), 1 << 16)
        for name in chunk[start : start + (1 << 16)].to_pylist()
    )
    return np.frombuffer(b"".join(digests), "<u8")


def _speakers(manifest: Manifest) -> tuple[list[str | None], np.ndarray]:
    """The names of speakers, None among them where rows have none, and the number of each row's, (rows,)
    int64."""
    encoded = manifest.column("speaker").dictionary_encode(null_encoding="encode").unify_dictionaries()
    numbers = [chunk.indices.to_numpy().astype(np.int64) for chunk in encoded.chunks]
    names = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    return names, np.concatenate([np.zeros(0, np.int64), *numbers])


def write_subset(
    folder: str | Path, manifest: Manifest, rows: np.ndarray, *, budget: str = "all", seed: int = 0
) -> Manifest:
    """`rows` of a manifest as one of its own, to report and to use again: same ids, audio, splits and
    alignments, in the file's order.

    meta.json has the `budget` and `seed` they were drawn with, their `minutes` and `minutes_by_speaker` (""
    for rows without one). Where the folder has this very subset, from a run that was interrupted, it stays;
    another one there is a ValueError.
    """
    chosen = manifest.take(np.sort(np.asarray(rows, np.int64)))
    plan = {"manifest": manifest.fingerprint, "budget": budget, "seed": seed, "utterances": len(chosen)}
    if is_complete(folder):
        meta = read_meta(folder, "manifest")
        there = {
            "manifest": meta["parents"].get("manifest"),
            **meta["config"],
            "utterances": meta["num_utterances"],
        }
        if differing := disagreements({key: there.get(key) for key in plan}, plan):
            raise ValueError(
                f"{folder}: holds another labelled subset ({differing}); remove it or change `out`"
            )
        subset = Manifest(folder)
        if subset.column("id").combine_chunks() != chosen.column("id").combine_chunks():
            raise ValueError(
                f"{folder}: holds a labelled subset of other utterances, by another text or vocabulary; "
                "remove it or change `out`"
            )
        return subset
    names, numbers = _speakers(chosen)
    minutes = (np.bincount(numbers, chosen.lengths, len(names)) / (60 * SAMPLE_RATE)).tolist()
    by_speaker = dict.fromkeys(sorted({name or "" for name in names}), 0.0)
    for name, amount in zip(names, minutes, strict=True):
        by_speaker[name or ""] += amount
    copy_manifest(
        folder,
        chosen,
        {"budget": budget, "seed": seed},
        {"manifest": manifest.fingerprint},
        budget=budget,
        budget_seed=seed,
        minutes=sum(minutes),
        minutes_by_speaker=by_speaker,
    )
    return Manifest(folder)
