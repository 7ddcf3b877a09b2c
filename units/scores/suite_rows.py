"""Rows of the files that list a suite: CSV and JSON lines, each with its place."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.sources.candidates import without_audio_suffix
from pretrain.store.plain_text import read_text


def as_number(row: dict[str, str], column: str) -> float | None:
    """The number in a column, None if there is none."""
    if not row.get(column):
        return None
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{row['source']}: {column} is {row[column]!r}; a number of at least 0 is needed")
    return value


def csv_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows as dicts, with their place under "source"."""
    text = _read(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        numbered = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num}: no CSV ({error}); is a quotation mark left open?"
        ) from None
    if missing := [name for name in needed if name not in (reader.fieldnames or [])]:
        have = ", ".join(reader.fieldnames or []) or "none"
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))}; its columns: {have}")
    rows = []
    for number, row in numbered:
        source = f"{path} line {number}"
        if None in row or any(row[name] is None for name in needed):
            raise ValueError(f"{source}: has {'more' if None in row else 'fewer'} fields than the header")
        if empty := [name for name in needed if not row[name].strip()]:
            raise ValueError(f"{source}: {empty[0]} is empty")
        rows.append({name: (value or "").strip() for name, value in row.items()} | {"source": source})
    return rows


def json_rows(path: Path) -> list[dict[str, str]]:
    """The rows of JSON lines."""
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path} line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not valid JSON ({error})") from None
        keys = {"positive", "negative"}
        if not isinstance(row, dict) or not keys <= row.keys() <= keys | {"item", "group"}:
            raise ValueError(
                f'{source}: an object with "positive", "negative" and perhaps "item" and "group" is needed'
            )
        if wrong := [key for key, value in row.items() if not isinstance(value, str) or not value]:
            raise ValueError(f"{source}: {wrong[0]} is {row[wrong[0]]!r}; a string is needed")
        rows.append({**row, "source": source})
    return rows


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such gold file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; the file with the pairs is needed") from None


def document_names(gold: str | None, ids: Sequence[str]) -> tuple[str, list[str]]:
    """Names without suffix of the recordings below the folder `gold`, or the corpus's ids; and where they
    come from."""
    if gold is None:
        return "the corpus's ids", sorted(ids)
    if not os.path.isdir(gold):
        raise ValueError(
            f"{gold}: no such folder; the suite's folder of recordings is needed, or no gold to read the "
            "corpus's ids"
        )
    root = Path(gold)
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    return gold, sorted(name for path in paths if (name := without_audio_suffix(path)) != path)


def complete(
    where: str, items: dict[str, dict[str, str]], sides: tuple[str, str], pattern: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """The items, once each is known to have both sides."""
    if not items:
        raise ValueError(f"{where}: no names like {pattern}")
    for item, names in items.items():
        if missing := [side for side in sides if side not in names]:
            raise ValueError(
                f"{where}: {next(iter(names.values()))!r} has no counterpart {missing[0]!r}; names like "
                f"{pattern} are needed"
            )
        yield item, names
