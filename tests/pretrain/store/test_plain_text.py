"""Text files of other programs: a byte-order mark is read, another encoding named by file and line, in every
reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import read_toml
from pretrain.ctc.lexicon import arpa_words, read_lexicon
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.weights.cards import read_yaml
from pretrain.weights.foreign import read_json
from units.formats.reading import guess_format, read_units
from units.lm.preferences import _records
from units.scores.suite_rows import csv_rows

ARPA = "\\data\\\nngram 1=1\n\n\\1-grams:\n-1.0\tübel\t0.0\n\n\\end\\\n"


def lexicon(path: Path) -> list[str]:
    text = TextConfig(case="keep")
    return [
        entry.word
        for entry in read_lexicon(str(path), Vocabulary(tuple("übel|"), "characters"), text).entries
    ]


# Suffix, a file of one line or more with an ü, its reader, and what it reads.
READERS: dict[str, tuple[str, str, Callable[[Path], Any], Any]] = {
    "TOML": (".toml", 'a = 1\nb = "ü"\n', read_toml, {"a": 1, "b": "ü"}),
    "JSON": (".json", '{"a":\n"ü"}', read_json, {"a": "ü"}),
    "YAML": (".yaml", "a: 1\nb: ü\n", read_yaml, [{"a": 1, "b": "ü"}]),
    "lexicon": (".lst", "bel\tb e l |\nübel\tü b e l |\n", lexicon, ["bel", "übel"]),
    "units": (
        ".units",
        "a\t1 2\nü\t3 4\n",
        lambda path: [d.id for d in read_units(path, guess_format(path))],
        ["a", "ü"],
    ),
    "pairs": (
        ".jsonl",
        '\n{"prompt": "ü", "chosen": 1, "rejected": 2}\n',
        lambda path: [row["prompt"] for _, row in _records(path)],
        ["ü"],
    ),
    "gold": (
        ".csv",
        "filename,correct\nü,1\n",
        lambda path: [row["filename"] for row in csv_rows(path, ("filename",))],
        ["ü"],
    ),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_reader_of_text_reads_a_byte_order_mark(tmp_path: Path, kind: str, encoding: str) -> None:
    suffix, text, read, found = READERS[kind]
    path = tmp_path / f"f{suffix}"
    path.write_bytes(text.encode(encoding))
    assert read(path) == found


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_of_text_names_the_line_that_is_latin_1(tmp_path: Path, kind: str) -> None:
    suffix, text, read, _ = READERS[kind]
    path = tmp_path / f"f{suffix}"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError,
        match=rf"{path}:?.* line 2: not UTF-8 text \(.*; as Latin-1 it reads .*ü.*iconv -f latin1 -t utf-8",
    ):
        read(path)


def test_a_language_model_with_a_byte_order_mark_is_refused_since_kenlm_does_not_read_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.arpa"
    path.write_text(ARPA, encoding="utf-8")
    assert arpa_words(str(path)) == ["übel"]
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(ARPA, encoding=encoding)
        with pytest.raises(
            ValueError,
            match=rf"decoding\.lm: {path} begins with a byte-order mark, which KenLM does not read",
        ):
            arpa_words(str(path))
    path.write_text(ARPA, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"decoding\.lm: {path} line 5: not UTF-8 text"):
        arpa_words(str(path))


def test_json_lines_of_units_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"file_name": "a.wav", "units": [1, 2], "duration": [1, 1]}) + "\n", encoding="utf-8-sig"
    )
    assert [document.id for document in read_units(path, guess_format(path))] == ["a"]
