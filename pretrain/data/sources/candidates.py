"""What the readers of sources share: a `Candidate` for each utterance that a source claims, its id, and what
is written about it."""

import difflib
import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from pretrain.data.decoding.spans import Member
from pretrain.data.utterance import Phone, Word

# What libsndfile reads, by the usual names: AIFF, AU, CAF, NIST sphere, Sony Wave64 and RF64 among them.
SUFFIXES = {
    ".wav",
    ".flac",
    ".ogg",
    ".mp3",
    ".oga",
    ".opus",
    ".sph",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".snd",
    ".caf",
    ".w64",
    ".rf64",
}
# Recordings that it does not read.
OTHER_SUFFIXES = {".m4a", ".m4b", ".aac", ".wma", ".mp4", ".webm", ".mka", ".amr", ".ape", ".wv"}

Row = TypeVar("Row", bound=BaseModel)
Triples = list[tuple[Annotated[FiniteFloat, Field(ge=0)], FiniteFloat, str]]


@dataclass(slots=True)
class Candidate:
    """An utterance that the source claims; `origin` is where, for messages, and `problem` what is already
    known to be wrong."""

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
    has_twin: bool = False  # its id keeps the suffix, since another recording differs from it in that alone


class About(BaseModel, coerce_numbers_to_str=True):
    """What a row of a list, or a `.json` beside a recording, can have besides the recording; other keys are
    ignored."""

    text: str | None = None
    speaker: str | None = None
    split: str | None = None
    phones: Triples | None = None
    words: Triples | None = None


def without_audio_suffix(name: str) -> str:
    """A recording's name without the suffix of an audio file, as ids are; other names stay as they are."""
    base, dot, suffix = name.rpartition(".")
    return base if dot + suffix.lower() in SUFFIXES | OTHER_SUFFIXES else name


class Names:
    """Ids for the recordings of a source: each name without its suffix, but with it where several would be
    left equal."""

    def __init__(self, names: Collection[str]):
        self._counts = Counter(os.path.splitext(name)[0] for name in set(names))

    def has_twin(self, name: str) -> bool:
        """Whether another name differs in its suffix alone."""
        return self._counts[os.path.splitext(name)[0]] > 1

    def __getitem__(self, name: str) -> str:
        return name if self.has_twin(name) else os.path.splitext(name)[0]


def parse_row(row_class: type[Row], text: str, origin: str) -> Row:
    """A JSON object as `row_class`; the first mistake is a ValueError that names `origin` and the key."""
    try:
        return row_class.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "missing" or key not in row_class.model_fields:
        got = repr(problem["input"])
        raise ValueError(f"{origin}: {key + ': ' if key else ''}{problem['msg']}, got {got[:80]}")
    near = difflib.get_close_matches(key, problem["input"], n=1)
    hint = (
        f"did you mean it by {near[0]!r}?" if near else f"it has {', '.join(problem['input']) or 'no keys'}"
    )
    raise ValueError(f"{origin}: no {key!r}; {hint}")


def as_phones(triples: Triples | None, origin: str) -> list[Phone] | None:
    """Phones in order. ValueError where one ends before it starts or overlaps the next."""
    return None if triples is None else [Phone(*triple) for triple in _in_order(triples, origin, "phone")]


def as_words(triples: Triples | None, origin: str) -> list[Word] | None:
    """Words in order, as phones. Aligners write pauses as words without a name: those are left out."""
    if triples is None:
        return None
    words = [
        Word(start, end, name.strip())
        for start, end, name in _in_order(triples, origin, "word")
        if name.strip()
    ]
    for word in words:
        if len(word.word.split()) > 1:
            raise ValueError(
                f"{origin}: word {word.word!r} at {word.start} s is several words; give each its own time"
            )
    return words


def _in_order(triples: Triples, origin: str, kind: str) -> Triples:
    """In order and without overlap beyond 1 ms of rounding, or a ValueError."""
    triples = sorted(triples)
    for (start, end, name), following in pairwise([*triples, (math.inf, math.inf, "")]):
        if end < start or end > following[0] + 0.001:
            raise ValueError(
                f"{origin}: {kind} {name!r} at {start} s ends before it starts or overlaps the next"
            )
    return triples
