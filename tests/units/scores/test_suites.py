import itertools
import json
import random
from pathlib import Path

import pytest

from units.scores.suites import SALMON_PARTS, Pair, join, read_suite

VOICES = ("A", "B")


def lexical_rows(words: int = 3) -> list[str]:
    """Rows as ZeroSpeech 2021 has them; ids of words and names of files have nothing to do with the order."""
    rows = []
    for word, voice, correct in itertools.product(range(words), VOICES, (1, 0)):
        frequency = (0, 4, 130)[word % 3] if correct else ""
        rows.append(f"f{word}{voice}{correct},{word},{voice},{frequency},w{word},p a,{word + 4},{correct}")
    return rows


def write_gold(path: Path, header: str, rows: list[str]) -> str:
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


LEXICAL = "filename,id,voice,frequency,word,phones,length,correct"
SYNTACTIC = "filename,id,voice,type,subtype,transcription,correct"


def write_lexical(tmp_path: Path, rows: list[str] | None = None) -> str:
    return write_gold(tmp_path / "gold.csv", LEXICAL, lexical_rows() if rows is None else rows)


def test_swuggy_joins_word_and_nonword_on_voice_and_id(tmp_path: Path) -> None:
    pairs = read_suite("swuggy", write_lexical(tmp_path), [])
    assert [(pair.item, pair.positive, pair.negative) for pair in pairs] == [
        (str(word), f"f{word}{voice}1", f"f{word}{voice}0") for word in range(3) for voice in VOICES
    ]
    assert [pair.groups for pair in pairs[::2]] == [
        {"vocabulary": "oov", "frequency": "oov", "length": "4"},
        {"vocabulary": "in", "frequency": "1-5", "length": "5"},
        {"vocabulary": "in", "frequency": ">100", "length": "6"},
    ]
    assert pairs[0].source == f"{tmp_path / 'gold.csv'} line 2"


def test_the_order_of_gold_rows_and_columns_changes_nothing(tmp_path: Path) -> None:
    ordered = read_suite("swuggy", write_lexical(tmp_path), [])
    rows = lexical_rows()
    random.Random(0).shuffle(rows)
    header, *shuffled = [",".join(reversed(row.split(","))) for row in [LEXICAL, *rows]]
    again = read_suite("swuggy", write_gold(tmp_path / "gold.csv", header, shuffled), [])
    assert [pair[:4] for pair in again] == [pair[:4] for pair in ordered]


def test_a_folder_stands_for_the_gold_in_it(tmp_path: Path) -> None:
    (tmp_path / "lexical" / "dev").mkdir(parents=True)
    write_gold(tmp_path / "lexical" / "dev" / "gold.csv", LEXICAL, lexical_rows())
    assert len(read_suite("swuggy", str(tmp_path), [])) == 6
    with pytest.raises(ValueError, match=r"neither gold.csv nor syntactic/dev/gold.csv"):
        read_suite("sblimp", str(tmp_path), [])


def test_a_gold_without_frequency_or_length_has_no_such_groups(tmp_path: Path) -> None:
    gold = write_gold(tmp_path / "gold.csv", "filename,id,voice,correct", ["a,0,A,1", "b,0,A,0"])
    assert [pair[:4] for pair in read_suite("swuggy", gold, [])] == [("0", "a", "b", {})]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,0,A,1,w,p,4,1", r"line 14: a second row with correct 1 for voice 'A', id '0'; see .*line 2"),
        ("x,9,A,1,w,p,4,1", r"line 14: 'x' has no counterpart with the same voice 'A', id '9'"),
        ("x,0,C,1,w,p,4,yes", r"line 14: correct is 'yes'; 1 or 0 is needed"),
        ("x,0,C,1,w,p,4", r"line 14: has fewer fields than the header"),
        ("x,0,C,1,w,p,4,1,7", r"line 14: has more fields than the header"),
        (",0,C,1,w,p,4,1", r"line 14: filename is empty"),
    ],
)
def test_a_wrong_row_of_a_gold_is_named_by_its_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_suite("swuggy", write_lexical(tmp_path, [*lexical_rows(), row]), [])


def test_wrong_frequencies_are_named_by_their_line(tmp_path: Path) -> None:
    for wrong in ("many", "-1", "nan"):
        gold = write_lexical(tmp_path, [f"a,0,A,{wrong},w,p,4,1", "b,0,A,,w,p,4,0"])
        with pytest.raises(ValueError, match=rf"line 2: frequency is '{wrong}'; a number of at least 0"):
            read_suite("swuggy", gold, [])


def test_sblimp_joins_on_type_subtype_id_and_voice(tmp_path: Path) -> None:
    rows = [
        f'{kind}{name}{voice}{correct},{name},{voice},{kind},{kind}_one,"it says, ""so""",{correct}'
        for kind, name, voice, correct in itertools.product(("npi", "ellipsis"), (0, 1), VOICES, (0, 1))
    ]
    pairs = read_suite("sblimp", write_gold(tmp_path / "gold.csv", SYNTACTIC, rows), [])
    assert len(pairs) == 8 and len({pair.item for pair in pairs}) == 4  # the ids are the same in both types
    assert pairs[0][:4] == (
        "ellipsis/ellipsis_one/0",
        "ellipsis0A1",
        "ellipsis0A0",
        {"type": "ellipsis", "subtype": "ellipsis/ellipsis_one"},
    )


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    gold = write_lexical(tmp_path)
    with pytest.raises(ValueError, match=r"gold.csv: no column 'type', 'subtype'; its columns: filename, id"):
        read_suite("sblimp", gold, [])
    with pytest.raises(ValueError, match=r"nowhere.csv: no such gold file"):
        read_suite("swuggy", str(tmp_path / "nowhere.csv"), [])
    with pytest.raises(ValueError, match=r"gold.csv: no rows"):
        read_suite("swuggy", write_lexical(tmp_path, []), [])


def test_stories_pair_by_name_from_a_folder_or_from_the_ids(tmp_path: Path) -> None:
    names = [f"{i}_{side}" for i in (0, 1, 10) for side in ("correct", "incorrect")]
    for name in names:
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "0_mutual.wav").touch()
    (tmp_path / "0_correct.txt").touch()
    expected = [(story, f"{story}_correct", f"{story}_incorrect") for story in ("0", "1", "10")]
    assert [pair[:3] for pair in read_suite("tstorycloze", str(tmp_path), [])] == expected
    assert [pair[:3] for pair in read_suite("tstorycloze", None, [*names, "0_mutual"][::-1])] == expected


def test_stories_whose_files_are_numbered_one_by_one_pair_by_the_rest_of_the_name() -> None:
    names = ["t/0_ab-7_correct", "t/1_ab-7_incorrect", "t/2_cd-1_correct", "t/3_cd-1_incorrect"]
    pairs = [pair[:3] for pair in read_suite("tstorycloze", None, names)]
    assert pairs == [("t/ab-7", names[0], names[1]), ("t/cd-1", names[2], names[3])]
    with pytest.raises(ValueError, match=r"'t/2_cd-1_correct' has no counterpart 'incorrect'"):
        read_suite("tstorycloze", None, names[:-1])
    with pytest.raises(ValueError, match=r"are both the correct ending of one story"):
        read_suite("tstorycloze", None, [*names, "t/4_cd-1_correct"])
    with pytest.raises(ValueError, match=r"the corpus's ids: no names like NAME_correct"):
        read_suite("tstorycloze", None, ["a", "b"])


def test_salmon_takes_option_0_as_the_real_one_in_each_of_its_parts(tmp_path: Path) -> None:
    names = [f"{part}/sample_{i}_{option}" for part in SALMON_PARTS for i in (0, 1, 10) for option in (0, 1)]
    for name in names:
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    expected = {
        (f"{part}/sample_{i}_0", f"{part}/sample_{i}_1", part) for part in SALMON_PARTS for i in (0, 1, 10)
    }
    for pairs in (
        read_suite("salmon", str(tmp_path), []),
        read_suite("salmon", None, [f"salmon/{name}" for name in names]),
    ):
        found = {
            (p.positive.removeprefix("salmon/"), p.negative.removeprefix("salmon/"), p.groups["part"])
            for p in pairs
        }
        assert found == expected and len(pairs) == 24
    one_part = read_suite("salmon", str(tmp_path / "rir_consistency"), [])
    assert one_part[0][:4] == ("/0", "sample_0_0", "sample_0_1", {"part": "rir_consistency"})
    with pytest.raises(ValueError, match=r"'x/sample_3_1' has no counterpart '0'"):
        read_suite("salmon", None, ["x/sample_3_1"])
    with pytest.raises(ValueError, match=r"no such folder"):
        read_suite("salmon", str(tmp_path / "elsewhere"), [])


def test_own_pairs_read_alike_from_json_lines_and_csv(tmp_path: Path) -> None:
    rows = [
        {"positive": "a", "negative": "b", "group": "g"},
        {"positive": "a", "negative": "c", "group": "h"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "own.csv").write_text("negative,positive,group\nb,a,g\nc,a,h\n")
    from_json, from_csv = (read_suite("pairs", str(tmp_path / name), []) for name in ("own.jsonl", "own.csv"))
    assert [pair[:4] for pair in from_json] == [pair[:4] for pair in from_csv]
    assert from_json == [
        Pair("a b", "a", "b", {"group": "g"}, f"{tmp_path / 'own.jsonl'} line 1"),
        Pair("a c", "a", "c", {"group": "h"}, f"{tmp_path / 'own.jsonl'} line 2"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not valid JSON"),
        ('["a", "b"]', r'line 2: an object with "positive", "negative"'),
        ('{"positive": "a", "negative": "b", "grop": "g"}', r"line 2: an object with"),
        ('{"positive": 1, "negative": "b"}', r"line 2: positive is 1; a string is needed"),
        ('{"positive": "b", "negative": "b"}', r"line 2: positive and negative are the same recording, 'b'"),
        (
            '{"positive": "c", "negative": "d", "item": "i", "group": "h"}',
            r"line 2: item 'i' is in group 'h' here, .* line 1",
        ),
    ],
)
def test_a_wrong_line_of_own_pairs_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(
        '{"positive": "a", "negative": "b", "item": "i", "group": "g"}\n' + line
    )
    with pytest.raises(ValueError, match=message):
        read_suite("pairs", str(tmp_path / "own.jsonl"), [])


def test_names_are_found_as_ids_or_as_the_ends_of_ids(tmp_path: Path) -> None:
    pairs = read_suite("swuggy", write_lexical(tmp_path), [])
    ids = [f"lexical/dev/{name}" for pair in pairs for name in pair[1:3]] + ["lexical/dev/extra"]
    random.Random(0).shuffle(ids)
    joined = join(pairs, ids, "corpus")
    assert [ids[i] for i in joined.positive] == [f"lexical/dev/{pair.positive}" for pair in pairs]
    assert [ids[i] for i in joined.negative] == [f"lexical/dev/{pair.negative}" for pair in pairs]
    assert joined.num_unused == 1
    exact = join(pairs, ids + (plain := [name for pair in pairs for name in pair[1:3]]), "corpus")
    assert exact.positive.min() >= len(ids) and exact.num_unused == len(ids) and len(plain) == 12


def test_recordings_that_the_corpus_lacks_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    pairs = read_suite("swuggy", write_lexical(tmp_path), [])
    ids = [name for pair in pairs[1:] for name in pair[1:3]]
    with pytest.raises(
        ValueError,
        match=r"corpus: lacks 2 of the 12 recordings of the suite; the first is 'f0A1' \(.*gold.csv line 2\)",
    ):
        join(pairs, ids, "corpus")
    with pytest.raises(ValueError, match=r"'f0A1' could be 'x/f0A1' or 'y/f0A1' of corpus"):
        join(pairs, [*ids, "x/f0A1", "y/f0A1", "f0A0"], "corpus")


def test_names_with_the_suffix_of_a_recording_are_found_too(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("positive,negative\na.wav,b.FLAC\nb.FLAC,c.wav\n")
    ids = ["x/a", "b", "c.wav", "c"]
    joined = join(read_suite("pairs", str(tmp_path / "pairs.csv"), ids), ids, "corpus")
    assert (joined.positive.tolist(), joined.negative.tolist()) == ([0, 1], [1, 2])


def test_an_open_quotation_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('positive,negative\na,b\nc,"d\n' + "x,y\n" * 40000)
    with pytest.raises(
        ValueError,
        match=r"pairs.csv line \d+: no CSV \(field larger than field limit .*; is a quotation mark",
    ):
        read_suite("pairs", str(tmp_path / "pairs.csv"), [])
