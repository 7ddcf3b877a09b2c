"""Minimal-pair suites: which of two recordings a language model ought to find likelier. Readers of the
benchmarks' own file layouts.

    swuggy       ZeroSpeech 2021 lexical/{dev,test}/gold.csv: filename, id, voice, correct, and where known
                 frequency, length
    sblimp       ZeroSpeech 2021 syntactic/{dev,test}/gold.csv: filename, id, voice, type, subtype, correct
    tstorycloze  TWIST's spoken StoryCloze (topic or semantic): NAME_correct.wav with NAME_incorrect.wav
    salmon       SALMon: PART/sample_INDEX_0.wav, the positive one, with PART/sample_INDEX_1.wav
    pairs        your own, JSON lines or CSV: positive, negative and, if you like, item and group

Where the names of the files say it all (`tstorycloze`, `salmon`), no gold is needed: the corpus's ids are
read instead. Everything is joined by name, never by row position (which is how the ZeroSpeech toolkit joins
sBLIMP, and how other tools pair sorted files).
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.sources.candidates import without_audio_suffix
from units.scores.suite_rows import as_number, complete, csv_rows, document_names, json_rows

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
    """Pairs as row numbers of the ids they were joined with, int64 (pairs,), and how many ids no pair asked
    for."""

    positive: np.ndarray
    negative: np.ndarray
    num_unused: int


def read_suite(suite: SuiteName, gold: str | None, ids: Sequence[str]) -> list[Pair]:
    """The pairs of a suite in an order of their own: sorted by item and names, whatever the order of the
    gold's rows.

    `ids` are the corpus's, read where `gold` is None. Errors: ValueError naming the file and the line or
    name, for missing columns, a row without its counterpart, two where one belongs.
    """
    assert gold is not None or suite not in GOLD_NEEDED  # the config refuses it
    pairs = list(_READERS[suite](gold, ids))
    return sorted(pairs, key=lambda pair: (pair.item, pair.positive, pair.negative))


def join(pairs: Sequence[Pair], ids: Sequence[str], corpus: str) -> Joined:
    """Find each pair's recordings among `ids`: an id that is the name, or else the one id that ends in "/"
    and the name; the name as it is, or else without the suffix of an audio file.

    Errors: ValueError with how many are missing, the first of them and where the gold names it; a name that
    several ids end in.
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
                f"{source}: {name!r} could be {ids[found[0]]!r} or {ids[found[1]]!r} of {corpus}; name more "
                "of the path in the gold, or pack a corpus of this suite alone"
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
            f"{corpus}: lacks {len(lost)} of the {len({n for p in pairs for n in p[1:3]})} recordings of the "
            f"suite; the first is {first!r} ({source}); index, encode and pack all of the suite's recordings"
        )
    return Joined(rows[:, 0], rows[:, 1], len(ids) - len(np.unique(rows)))


def _swuggy(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Words and nonwords joined on (voice, id). In-vocabulary: a frequency of at least 1 in LibriSpeech;
    bands as ZeroSpeech has them."""
    path = _gold_file(gold, "lexical")
    for (_, name), word, nonword in _counterparts(path, ("voice", "id")):
        groups = {}
        if (frequency := as_number(word, "frequency")) is not None:
            groups = {"vocabulary": "in" if frequency >= 1 else "oov", "frequency": _band(frequency)}
        if (length := as_number(word, "length")) is not None:
            groups["length"] = f"{length:g}"
        yield Pair(name, word["filename"], nonword["filename"], groups, word["source"])


def _sblimp(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Sentences joined on (type, subtype, id, voice)."""
    for key, good, bad in _counterparts(_gold_file(gold, "syntactic"), ("type", "subtype", "id", "voice")):
        kind, subtype, name, _ = key
        groups = {"type": kind, "subtype": f"{kind}/{subtype}"}
        yield Pair(f"{kind}/{subtype}/{name}", good["filename"], bad["filename"], groups, good["source"])


def _tstorycloze(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """Whole stories `NAME_correct` and `NAME_incorrect`; a leading `NUMBER_` that differs within the pairs is
    left out of NAME."""
    where, names = document_names(gold, ids)
    sides: dict[str, dict[str, str]] = {}
    for numbered in (True, False):
        sides = defaultdict(dict)
        for name in names:
            if match := re.fullmatch(r"(.*)_(correct|incorrect)", name):
                story = match[1] if numbered else re.sub(r"(^|/)\d+_([^/]+)$", r"\1\2", match[1])
                if match[2] in sides[story]:
                    raise ValueError(
                        f"{where}: {sides[story][match[2]]!r} and {name!r} are both the {match[2]} ending of "
                        "one story"
                    )
                sides[story][match[2]] = name
        if all(len(pair) == 2 for pair in sides.values()):
            break
    yield from (
        Pair(story, pair["correct"], pair["incorrect"], {}, where)
        for story, pair in complete(where, sides, ("correct", "incorrect"), "NAME_correct and NAME_incorrect")
    )


def _salmon(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """`PART/sample_INDEX_OPTION`: option 0 is the real recording; every other option makes a pair with it."""
    where, names = document_names(gold, ids)
    options: dict[str, dict[str, str]] = defaultdict(dict)
    parts = {}
    for name in names:
        if match := re.fullmatch(r"(?:(.*)/)?sample_(\d+)_(\d+)", name):
            folders = (match[1] or (os.path.basename(os.path.abspath(where)) if gold else "")).split("/")
            item = f"{match[1] or ''}/{match[2]}"
            parts[item] = next((folder for folder in folders if folder in SALMON_PARTS), folders[-1])
            options[item][match[3]] = name
    for item, samples in complete(where, options, ("0", "1"), "PART/sample_INDEX_0 and PART/sample_INDEX_1"):
        for option in sorted(samples.keys() - {"0"}):
            yield Pair(item, samples["0"], samples[option], {"part": parts[item]}, where)


def _pairs(gold: str | None, ids: Sequence[str]) -> Iterator[Pair]:
    """JSON lines (`.jsonl`, `.json`) or CSV with the keys positive and negative and, where wanted, item and
    group."""
    assert gold is not None
    path = Path(gold)
    rows = json_rows(path) if path.suffix in {".jsonl", ".json"} else csv_rows(path, ("positive", "negative"))
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
    for row in csv_rows(path, ("filename", "correct", *keys)):
        if row["correct"] not in {"0", "1"}:
            raise ValueError(f"{row['source']}: correct is {row['correct']!r}; 1 or 0 is needed")
        key = tuple(row[name] for name in keys)
        other = sides[key].setdefault(row["correct"], row)
        if other is not row:
            raise ValueError(
                f"{row['source']}: a second row with correct {row['correct']} for {_named(keys, key)}; see "
                f"{other['source']}"
            )
    for key, rows in sides.items():
        if len(rows) < 2:
            (alone,) = rows.values()
            raise ValueError(
                f"{alone['source']}: {alone['filename']!r} has no counterpart with the same "
                f"{_named(keys, key)}"
            )
        yield key, rows["1"], rows["0"]
    if not sides:
        raise ValueError(f"{path}: no rows")


def _named(keys: Iterable[str], values: Iterable[str]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in zip(keys, values, strict=True))
