"""Units as a record per line: slamkit's JSON lines, and the Python dicts of speech-resynthesis. All hold one
level."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.utterance import SAMPLE_RATE
from units.corpus.corpus_writing import Document
from units.formats.description import Described, Format, Located
from units.formats.lines import (
    check_durations,
    id_of_path,
    integers,
    parse_integers,
    parse_json,
    path_of_id,
    read_lines,
    written,
)

CODE_KEYS = ("hubert", "codes", "hubert_km100", "cpc_km100", "vqvae256", "units", "code")
_TOKENS = re.compile(r"(?:<Un[0-9]{1,9}>)+", re.ASCII)


def read_slamkit_features(path: Path, stem: bool = False) -> Iterator[Located]:
    """slamkit's `extract_features.py`: {"units": [3, 49], "duration": [1, 4], "file_name": "a/b.flac"}; other
    keys are not read."""
    for where, line in read_lines(path):
        row = parse_json(line, where)
        units = integers(row.get("units"), f"{where}: 'units'")
        durations = check_durations(
            integers(row.get("duration"), f"{where}: 'duration'", "duration"), units, where
        )
        yield Located(where, Document(_name(row, "file_name", where, stem), None, units, durations))


def write_slamkit_features(path: Path, documents: Iterator[Document], described: Described) -> None:
    """Needs durations: slamkit has no rows without."""
    if not described.timed:
        raise ValueError(
            f"{path}: slamkit-features needs durations, and these units have none; write slamkit-tokens"
        )
    with written(path) as file:
        for document in documents:
            assert document.durations is not None
            row = {
                "units": document.units.tolist(),
                "duration": document.durations.tolist(),
                "file_name": path_of_id(document.id),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_slamkit_tokens(path: Path, stem: bool = False) -> Iterator[Located]:
    """slamkit's `prepare_tokens.py`: {"file_name": "a/b.flac", "audio_repr": "<Un3><Un49>"}, and "duration"
    as in the features where it was kept. Interleaved text is refused."""
    for where, line in read_lines(path):
        row = parse_json(line, where)
        text = row.get("audio_repr")
        if not isinstance(text, str) or not _TOKENS.fullmatch(text):
            found = re.sub(_TOKENS, "", text)[:40] if isinstance(text, str) else text
            raise ValueError(f"{where}: 'audio_repr' has {found!r}, expected units alone: <Un3><Un49>…")
        units = np.fromstring(text[3:-1].replace("><Un", " "), np.int32, sep=" ")
        durations = None
        if "duration" in row:
            durations = check_durations(
                integers(row["duration"], f"{where}: 'duration'", "duration"), units, where
            )
        yield Located(where, Document(_name(row, "file_name", where, stem), None, units, durations))


def write_slamkit_tokens(path: Path, documents: Iterator[Document], described: Described) -> None:
    """Durations of deduplicated units go under a key that slamkit drops when it loads the file."""
    with written(path) as file:
        for document in documents:
            tokens = "".join(f"<Un{unit}>" for unit in document.units.tolist())
            row = {"file_name": path_of_id(document.id), "audio_repr": tokens}
            durations = None if described.deduplicated is False else document.durations
            more = {} if durations is None else {"duration": durations.tolist()}
            file.write(json.dumps({**row, **more}, ensure_ascii=False) + "\n")


def _describe_slamkit_tokens(path: Path, **options: Any) -> Mapping[str, Any]:
    where, line = next(read_lines(path))
    return {"timed": "duration" in parse_json(line, where)}


def read_resynthesis(path: Path, key: str | None = None, stem: bool = False) -> Iterator[Located]:
    """speech-resynthesis, unit HiFi-GAN, pGSLM: {'audio': 'a/b.wav', 'hubert': '71 86 86', 'duration': 4.56},
    a label per frame; the duration, in seconds, where it is a number. `key` says under which the units are,
    if under none of the usual.

    Such lines are Python text, which these tools `eval`. Here only literals are read, and nothing is
    executed.
    """
    for where, line in read_lines(path):
        row = _literal(line, where)
        keys = [name for name in ((key,) if key else CODE_KEYS) if name in row]
        if len(keys) != 1:
            found = (
                f"units under {' and '.join(keys)}"
                if keys
                else f"no units, its keys are {', '.join(map(str, row)) or 'none'}"
            )
            raise ValueError(
                f"{where}: {found}; expected one of {key or ', '.join(CODE_KEYS)} (say which with key=…)"
            )
        value = row[keys[0]]
        label = f"{where}: {keys[0]!r}"
        units = (
            parse_integers(value, label, "label")
            if isinstance(value, str)
            else integers(value, label, "label")
        )
        yield Located(
            where,
            Document(_name(row, "audio", where, stem), None, units),
            _samples(row),
            f"{where}: 'duration'",
        )


def _samples(row: Mapping[Any, Any]) -> int | None:
    """Samples at 16 kHz of the row's `duration` in seconds; None where it is no length."""
    seconds: Any = row.get("duration")
    known = isinstance(seconds, int | float) and 0 < seconds < 1e9
    return round(seconds * SAMPLE_RATE) if known else None


def _literal(line: str, where: str) -> dict[Any, Any]:
    expected = "expected a dict such as {'audio': 'a.wav', 'hubert': '3 49 7'}"
    try:
        row = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{where}: no Python literal ({type(error).__name__}), {expected}; nothing else is read"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is a {type(row).__name__}, {expected}")
    return row


def write_resynthesis(path: Path, documents: Iterator[Document], described: Described) -> None:
    """A label per frame; `duration` in seconds where the frame rate is known."""
    with written(path) as file:
        for document in documents:
            row: dict[str, Any] = {
                "audio": path_of_id(document.id),
                "hubert": " ".join(map(str, document.units.tolist())),
            }
            if described.frame_rate_hz:
                row["duration"] = round(len(document.units) / described.frame_rate_hz, 4)
            file.write(f"{row!r}\n")


def _name(row: Mapping[Any, Any], key: str, where: str, stem: bool) -> str:
    if not isinstance(value := row.get(key), str):
        raise ValueError(
            f"{where}: {key!r} is {'missing' if value is None else repr(value)[:40]}, expected the path of a "
            "recording"
        )
    return id_of_path(value, f"{where}: {key!r}", stem)


SLAMKIT_FEATURES = Format(
    "slamkit-features",
    read_slamkit_features,
    write_slamkit_features,
    lambda path, **options: {"timed": True},
    options=("stem",),
)
SLAMKIT_TOKENS = Format(
    "slamkit-tokens",
    read_slamkit_tokens,
    write_slamkit_tokens,
    _describe_slamkit_tokens,
    options=("stem",),
)
RESYNTHESIS = Format(
    "resynthesis",
    read_resynthesis,
    write_resynthesis,
    lambda path, **options: {"deduplicated": False, "timed": True},
    per_frame=True,
    options=("key", "stem"),
)
