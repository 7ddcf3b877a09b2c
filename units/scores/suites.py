"""Minimal-pair suites: which of two recordings a language model ought to find likelier. Readers of the benchmarks' own file layouts.

| suite | layout | gold |
| --- | --- | --- |
| `swuggy` | ZeroSpeech 2021 `lexical/{dev,test}/gold.csv`: filename, id, voice, correct, and where known frequency, length | that file |
| `sblimp` | ZeroSpeech 2021 `syntactic/{dev,test}/gold.csv`: filename, id, voice, type, subtype, correct | that file |
| `tstorycloze` | TWIST's spoken StoryCloze (topic or semantic): `NAME_correct.wav` with `NAME_incorrect.wav` | the folder, or none |
| `salmon` | SALMon: `PART/sample_INDEX_0.wav`, the positive one, with `PART/sample_INDEX_1.wav` | the folder, or none |
| `pairs` | your own, JSON lines or CSV: positive, negative and, if you like, item and group | that file |

Where the names of the files say it all (`tstorycloze`, `salmon`), no gold is needed: the corpus's ids are read instead. Everything
is joined by name, never by row position (which is how the ZeroSpeech toolkit joins sBLIMP, and how other tools pair sorted files).
"""

import csv
import io
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pretrain.data.sources.candidates import without_audio_suffix
from pretrain.store.plain_text import read_text

SuiteName = Literal["swuggy", "sblimp", "tstorycloze", "salmon", "pairs"]

GOLD_NEEDED = {"swuggy", "sblimp", "pairs"}  # the names of the files say nothing of which pair they make
SALMON_PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)


class Pair(NamedTuple):
    """Two recordings, by file name without suffix: the positive one should be likelier."""

    item: str  # pairs of one item (the voices that say it) are averaged before items are
    positive: str
    negative: str
    groups: dict[str, str]  # what results are also told by: {"type": "agreement"}
    source: str  # where it was read, for messages


class Joined(NamedTuple):
    """Pairs as row numbers of the ids they were joined with, int64 (pairs,), and how many ids no pair asked for."""

    positive: np.ndarray
    negative: np.ndarray
    num_unused: int


def read_suite(suite: SuiteName, gold: str | None, ids: Sequence[str]) -> list[Pair]:
    """The pairs of a suite in an order of their own: sorted by item and names, whatever the order of the gold's rows.

    `ids` are the corpus's, read where `gold` is None. Errors: ValueError naming the file and the line or name, for missing columns,
    a row without its counterpart, two where one belongs.
    """
    assert gold is not None or suite not in GOLD_NEEDED  # the config refuses it
    pairs = list(_READERS[suite](gold, ids))
    return sorted(pairs, key=lambda pair: (pair.item, pair.positive, pair.negative))


def join(pairs: Sequence[Pair], ids: Sequence[str], corpus: str) -> Joined:
    """Find each pair's recordings among `ids`: an id that is the name, or else the one id that ends in "/" and the name; the name
    as it is, or else without the suffix of an audio file.

    Errors: ValueError with how many are missing, the first of them and where the gold names it; a name that several ids end in.
    """
    exact = {name: i for i, name in enumerate(ids)}
    depths = {name.count("/") + 1 for pair in pairs for name in (pair.positive, pair.negative)}
    endings: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(ids):
        parts = name.split("/")
        for depth in depths:
            if depth < len(parts):
                endings["/".join(parts[-depth:])].append(i)

    def find(name: str, source: str) -> int:
        plain = without_audio_suffix(name)
        if (row := exact.get(name, exact.get(plain))) is not None:
            return row
        found = endings.get(name) or endings.get(plain, [])
        if len(found) > 1:
            raise ValueError(
                f"{source}: {name!r} could be {ids[found[0]]!r} or {ids[found[1]]!r} of {corpus}; "
                "name more of the path in the gold, or pack a corpus of this suite alone"
            )
        return found[0] if found else -1

    rows = np.array(
        [(find(pair.positive, pair.source), find(pair.negative, pair.source)) for pair in pairs], np.int64
    ).reshape(-1, 2)
    if (rows < 0).any():
        lost = {
            name: pair.source
            for pair, row in zip(pairs, rows, strict=True)
            for name, i in zip(pair[1:3], row, strict=True)
            if i < 0
        }
        first, source = next(iter(lost.items()))
        raise ValueError(
            f"{corpus}: lacks {len(lost)} of the {len({n for p in pairs for n in p[1:3]})} recordings of the suite; "
            f"the first is {first!r} ({source}); index, encode and pack all of the suite's recordings"
        )
    return Joined(rows[:, 0], rows[:, 1], len(ids) - len(np.unique(rows)))


def _swuggy(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Words and nonwords joined on (voice, id). In-vocabulary: a frequency of at least 1 in LibriSpeech; bands as ZeroSpeech has them."""
    path = _gold_file(gold, "lexical")
    for (_, name), word, nonword in _counterparts(path, ("voice", "id")):
        groups = {}
        if (frequency := _number(word, "frequency")) is not None:
            groups = {"vocabulary": "in" if frequency >= 1 else "oov", "frequency": _band(frequency)}
        if (length := _number(word, "length")) is not None:
            groups["length"] = f"{length:g}"
        yield Pair(name, word["filename"], nonword["filename"], groups, word["source"])


def _sblimp(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Sentences joined on (type, subtype, id, voice)."""
    for key, good, bad in _counterparts(_gold_file(gold, "syntactic"), ("type", "subtype", "id", "voice")):
        kind, subtype, name, _ = key
        groups = {"type": kind, "subtype": f"{kind}/{subtype}"}
        yield Pair(f"{kind}/{subtype}/{name}", good["filename"], bad["filename"], groups, good["source"])


def _tstorycloze(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Whole stories `NAME_correct` and `NAME_incorrect`; a leading `NUMBER_` that differs within the pairs is left out of NAME."""
    where, names = _names(gold, ids)
    sides: dict[str, dict[str, str]] = {}
    for numbered in (True, False):
        sides = defaultdict(dict)
        for name in names:
            if match := re.fullmatch(r"(.*)_(correct|incorrect)", name):
                story = match[1] if numbered else re.sub(r"(^|/)\d+_([^/]+)$", r"\1\2", match[1])
                if match[2] in sides[story]:
                    raise ValueError(
                        f"{where}: {sides[story][match[2]]!r} and {name!r} are both the {match[2]} ending of one story"
                    )
                sides[story][match[2]] = name
        if all(len(pair) == 2 for pair in sides.values()):
            break
    yield from (
        Pair(story, pair["correct"], pair["incorrect"], {}, where)
        for story, pair in _complete(
            where, sides, ("correct", "incorrect"), "NAME_correct and NAME_incorrect"
        )
    )


def _salmon(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """`PART/sample_INDEX_OPTION`: option 0 is the real recording; every other option makes a pair with it."""
    where, names = _names(gold, ids)
    options: dict[str, dict[str, str]] = defaultdict(dict)
    parts = {}
    for name in names:
        if match := re.fullmatch(r"(?:(.*)/)?sample_(\d+)_(\d+)", name):
            folders = (match[1] or (os.path.basename(os.path.abspath(where)) if gold else "")).split("/")
            item = f"{match[1] or ''}/{match[2]}"
            parts[item] = next((folder for folder in folders if folder in SALMON_PARTS), folders[-1])
            options[item][match[3]] = name
    for item, samples in _complete(where, options, ("0", "1"), "PART/sample_INDEX_0 and PART/sample_INDEX_1"):
        for option in sorted(samples.keys() - {"0"}):
            yield Pair(item, samples["0"], samples[option], {"part": parts[item]}, where)


def _pairs(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """JSON lines (`.jsonl`, `.json`) or CSV with the keys positive and negative and, where wanted, item and group."""
    assert gold is not None
    path = Path(gold)
    rows = (
        _json_rows(path) if path.suffix in {".jsonl", ".json"} else _csv_rows(path, ("positive", "negative"))
    )
    firsts: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["positive"] == row["negative"]:
            raise ValueError(
                f"{row['source']}: positive and negative are the same recording, {row['positive']!r}"
            )
        item, group = row.get("item") or f"{row['positive']} {row['negative']}", row.get("group", "")
        if (first := firsts.setdefault(item, row)).get("group", "") != group:
            raise ValueError(
                f"{row['source']}: item {item!r} is in group {group!r} here, in another at {first['source']}"
            )
        yield Pair(item, row["positive"], row["negative"], {"group": group} if group else {}, row["source"])
    if not rows:
        raise ValueError(f"{path}: no pairs")


_READERS: dict[SuiteName, Callable[[str | None, Sequence[str]], Iterator[Pair]]] = {
    "swuggy": _swuggy,
    "sblimp": _sblimp,
    "tstorycloze": _tstorycloze,
    "salmon": _salmon,
    "pairs": _pairs,
}


def _band(frequency: float) -> str:
    """The toolkit's bands under the toolkit's names, which its edges (5 is in "6-20") do not quite keep."""
    bands = ((100, ">100"), (20, "21-100"), (5, "6-20"), (1, "1-5"), (0, "oov"))
    return next(band for least, band in bands if frequency >= least)


def _gold_file(gold: str | None, task: str) -> Path:
    """`gold` itself, or in the folder of that name `gold.csv` or ZeroSpeech's `lexical/dev/gold.csv`."""
    assert gold is not None
    path = Path(gold)
    if not path.is_dir():
        return path
    places = [path / "gold.csv", path / task / "dev" / "gold.csv"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: holds neither gold.csv nor {task}/dev/gold.csv; give the file as gold")
    return found


def _counterparts(
    path: Path, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, str], dict[str, str]]]:
    """Rows of a ZeroSpeech gold that share `keys`: the correct one and the other."""
    sides: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in _csv_rows(path, ("filename", "correct", *keys)):
        if row["correct"] not in {"0", "1"}:
            raise ValueError(f"{row['source']}: correct is {row['correct']!r}; 1 or 0 is needed")
        key = tuple(row[name] for name in keys)
        other = sides[key].setdefault(row["correct"], row)
        if other is not row:
            raise ValueError(
                f"{row['source']}: a second row with correct {row['correct']} for {_named(keys, key)}; see {other['source']}"
            )
    for key, rows in sides.items():
        if len(rows) < 2:
            (alone,) = rows.values()
            raise ValueError(
                f"{alone['source']}: {alone['filename']!r} has no counterpart with the same {_named(keys, key)}"
            )
        yield key, rows["1"], rows["0"]
    if not sides:
        raise ValueError(f"{path}: no rows")


def _named(keys: Iterable[str], values: Iterable[str]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in zip(keys, values, strict=True))


def _number(row: dict[str, str], column: str) -> float | None:
    if not row.get(column):
        return None
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{row['source']}: {column} is {row[column]!r}; a number of at least 0 is needed")
    return value


def _csv_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
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


def _json_rows(path: Path) -> list[dict[str, str]]:
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


def _names(gold: str | None, ids: Sequence[str]) -> tuple[str, list[str]]:
    """Names without suffix of the recordings below the folder `gold`, or the corpus's ids; and where they come from."""
    if gold is None:
        return "the corpus's ids", sorted(ids)
    if not os.path.isdir(gold):
        raise ValueError(
            f"{gold}: no such folder; the suite's folder of recordings is needed, or no gold to read the corpus's ids"
        )
    root = Path(gold)
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    return gold, sorted(name for path in paths if (name := without_audio_suffix(path)) != path)


def _complete(
    where: str, items: dict[str, dict[str, str]], sides: tuple[str, str], pattern: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """The items, once each is known to have both sides."""
    if not items:
        raise ValueError(f"{where}: no names like {pattern}")
    for item, names in items.items():
        if missing := [side for side in sides if side not in names]:
            raise ValueError(
                f"{where}: {next(iter(names.values()))!r} has no counterpart {missing[0]!r}; names like {pattern} are needed"
            )
        yield item, names
