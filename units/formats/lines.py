"""Text with a document per line: reading lines, whole numbers and names, with mistakes named `FILE: line N:
what is wrong`."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from pretrain.data.sources.candidates import without_audio_suffix
from pretrain.store.disk import atomic_path
from pretrain.store.plain_text import decode_line, raw_lines
from units.corpus.sequence import MAX_DURATION

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)  # nine digits fit in 32 bits; no codebook has a billion units
_NUMBERS = re.compile(r"[0-9]{1,9}(?: +[0-9]{1,9})*", re.ASCII)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file, one at a time, without their ends. ValueError: no such file, no lines, an
    empty line, a NUL byte, bytes that are no UTF-8 (nor UTF-16 with a byte-order mark)."""
    if not path.is_file():
        raise ValueError(
            f"{path}: {'is a folder; a file of units is needed' if path.is_dir() else 'no such file'}"
        )
    number = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(raw_lines(file, str(path)), start=1):
            where = f"{path}: line {number}"
            text = decode(raw, where)
            if not text.strip():
                raise ValueError(
                    f"{where}: is empty, expected an utterance; leave out utterances that have no units"
                )
            yield where, text
    if not number:
        raise ValueError(f"{path}: is empty, expected a line for each utterance")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text without NUL, or a ValueError."""
    if b"\0" in data:
        raise ValueError(f"{where}: has a NUL byte, expected text; the file is damaged, or of another format")
    return decode_line(data, where)


def parse_integers(text: str, where: str, what: str = "unit") -> np.ndarray:
    """`3 49 7` to int32 (n,). ValueError naming the first word that is no whole number from 0 to
    999999999."""
    text = text.strip(" ")
    if not _NUMBERS.fullmatch(text):
        if not text:
            raise ValueError(
                f"{where}: has no {what}s, expected whole numbers with spaces between; leave the utterance "
                "out"
            )
        words = [word for word in text.split(" ") if word]
        place, word = next((place, word) for place, word in enumerate(words) if not _NUMBER.fullmatch(word))
        raise ValueError(
            f"{where}: {what} {place} (from 0) is {word[:40]!r}, expected a whole number that is not "
            f"negative{_hint(word)}"
        )
    return np.fromstring(text, np.int32, sep=" ")


def _hint(word: str) -> str:
    if re.fullmatch(r"\d+(,\d+)+", word):
        return "; separate them by spaces, not commas"
    if word == "|" or "|" in word:
        return "; is this `name|units`, format gslm?"
    return "; is this a `name<TAB>units` or a .tsv?" if "\t" in word else ""


def integers(values: Any, where: str, what: str = "unit") -> np.ndarray:
    """A parsed list of whole numbers to int32 (n,). ValueError naming the first that is none; `true` and
    `1.0` are none."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{where}: the {what}s are {_kind(values)}, expected a list of whole numbers")
    if not values:
        raise ValueError(f"{where}: has no {what}s; leave the utterance out")
    if not set(map(type, values)) <= {int} or min(values) < 0 or max(values) > 999_999_999:
        place, value = next(
            (i, value)
            for i, value in enumerate(values)
            if type(value) is not int or not 0 <= value <= 999_999_999
        )
        raise ValueError(
            f"{where}: {what} {place} (from 0) is {repr(value)[:40]}, expected a whole number that is not "
            "negative"
        )
    return np.array(values, np.int32)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def check_durations(durations: np.ndarray, units: np.ndarray, where: str) -> np.ndarray:
    """Durations in frames as uint16 (n,): one for each unit, each from 1 to 65535, or a ValueError."""
    if len(durations) != len(units):
        raise ValueError(f"{where}: {len(durations)} durations for {len(units)} units; expected one for each")
    wrong = np.flatnonzero((durations < 1) | (durations > MAX_DURATION))
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"{where}: duration {place} (from 0) is {int(durations[place])} frames, expected 1 to "
            f"{MAX_DURATION}"
        )
    return durations.astype(np.uint16)


def id_of_path(path: str, where: str, stem: bool = False) -> str:
    """The utterance of a recording: its path without the suffix of an audio file, as `wordless index` names
    them; with `stem` without folders, too."""
    name = without_audio_suffix(os.path.basename(path) if stem else path)
    if not name:
        raise ValueError(f"{where}: the name is empty, expected that of an utterance")
    return name


def path_of_id(name: str) -> str:
    """A path that `id_of_path` gives the name back of. A corpus does not know where its recordings lie."""
    return name + ".wav"


def parse_json(data: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object, or a ValueError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {_kind(value)}, expected a JSON object")
    return cast(dict[str, Any], value)


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A text file to be written, visible when the context ends well."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        yield file


def spaced(values: np.ndarray) -> str:
    """`3 49 7`."""
    return " ".join(map(str, values.tolist()))
