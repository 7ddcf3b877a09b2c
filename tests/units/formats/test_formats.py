"""Other tools' unit files: what is read is what they hold, what is written comes back, and what is malformed
is named."""

import ast
import json
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.sequence import deduplicate, expand
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.formats.description import Described, read_sidecar, sidecar_path
from units.formats.known import FORMATS
from units.formats.reading import describe_source, fingerprint_source, guess_format, read_units
from units.formats.writing import export_corpus, write_units

SUFFIX = {
    "km": ".km",
    "textlesslib": ".units",
    "parquet": ".parquet",
    "codec": "",
    "gslm": ".txt",
    "resynthesis": ".txt",
}
KNOWN = Described(
    codebook="c0de", num_units=500, frame_rate_hz=25.0, deduplicated=True, timed=True, source="beef"
)


def documents() -> list[Document]:
    return [
        Document("84/121/84-121-0000", None, np.array([3, 49, 3], np.uint16), np.array([1, 4, 2], np.uint16)),
        Document("84/121/84-121-0001.b", None, np.array([499], np.uint16), np.array([7], np.uint16)),
        Document("Ünï côde", None, np.array([0, 1], np.uint16), np.array([1, 1], np.uint16)),
    ]


def path_for(folder: Path, form: str) -> Path:
    return folder / f"train{SUFFIX.get(form, '.jsonl')}"


def assert_same(found: list[Document], expected: list[Document]) -> None:
    assert [document.id for document in found] == [document.id for document in expected]
    assert [document.split for document in found] == [document.split for document in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.units, theirs.units) and ours.units.shape == theirs.units.shape
        assert (ours.durations is None) == (theirs.durations is None)
        assert ours.durations is None or np.array_equal(ours.durations, theirs.durations)


def frame_by_frame(stream: list[Document]) -> list[Document]:
    """What a format whose unit is a frame gives back."""
    laid_out = [
        document
        if document.durations is None
        else document._replace(units=expand(document.units, document.durations))
        for document in stream
    ]
    return [document._replace(durations=np.ones(len(document.units))) for document in laid_out]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_comes_back_with_its_description(tmp_path: Path, form: str) -> None:
    path = path_for(tmp_path, form)
    summary = write_units(path, form, documents(), KNOWN)
    assert summary["num_documents"] == 3 and summary["codebook"] == "c0de"
    per_frame = FORMATS[form].per_frame
    expected = frame_by_frame(documents()) if per_frame else documents()
    if form == "codec":  # a folder is read in its own order, its files before its folders
        expected = [expected[2], *expected[:2]]
    assert_same(list(read_units(path, form)), expected)
    described = describe_source(path, form)
    assert described.model_dump(include=set(Described.model_fields)) == {
        **KNOWN.model_dump(),
        "deduplicated": not per_frame,
    }
    assert guess_format(path) == form
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "slamkit-features"])
def test_what_is_written_without_durations_comes_back_without(tmp_path: Path, form: str) -> None:
    untimed = [document._replace(durations=None) for document in documents()]
    described = KNOWN.model_copy(update={"timed": False})
    if FORMATS[form].per_frame:
        with pytest.raises(
            ValueError,
            match=f"{form} has a label per frame, and how many frames these units last is not known",
        ):
            write_units(path_for(tmp_path, form), form, untimed, described)
        assert not any(tmp_path.iterdir())
    else:
        write_units(path_for(tmp_path, form), form, untimed, described)
        assert_same(list(read_units(path_for(tmp_path, form), form)), untimed)


def test_slamkit_features_refuse_units_without_durations(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="slamkit-features needs durations, and these units have none; write slamkit-tokens"
    ):
        write_units(
            tmp_path / "a.jsonl", "slamkit-features", [documents()[0]._replace(durations=None)], KNOWN
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_units_that_are_frames_come_back_as_frames(tmp_path: Path, form: str) -> None:
    stream = [
        Document("a", None, np.array([3, 3, 0]), np.ones(3)),
        Document("b", None, np.array([1]), np.ones(1)),
    ]
    write_units(path_for(tmp_path, form), form, stream, KNOWN.model_copy(update={"deduplicated": False}))
    assert_same(list(read_units(path_for(tmp_path, form), form)), stream)
    assert form == "textlesslib" or not list(tmp_path.glob("*.durations"))


@pytest.mark.parametrize("form", FORMATS)
def test_several_levels_come_back_or_are_refused(tmp_path: Path, form: str) -> None:
    stream = [
        Document("b/x", None, np.array([[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 9]]), np.ones(3)),
        Document("c", None, np.array([[9, 9, 9, 0]]), np.ones(1)),
    ]
    described = KNOWN.model_copy(update={"num_levels": 4, "deduplicated": False})
    if FORMATS[form].levels:
        write_units(path_for(tmp_path, form), form, stream, described)
        assert_same(
            sorted(read_units(path_for(tmp_path, form), form), key=lambda document: document.id), stream
        )
        assert describe_source(path_for(tmp_path, form), form).num_levels == 4
    else:
        with pytest.raises(
            ValueError, match=f"{form} holds one level of units, and these have 4; write codec or parquet"
        ):
            write_units(path_for(tmp_path, form), form, stream, described)
        assert not any(tmp_path.iterdir())


NAMES = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\r\0|\ufeff"), min_size=1, max_size=20
)
FRAMES = st.lists(st.integers(0, 6), min_size=1, max_size=30).map(lambda frames: np.array(frames, np.uint16))


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "codec"])  # its ids are names of files
@settings(max_examples=25, deadline=None)  # it writes files
@given(stream=st.dictionaries(NAMES.filter(lambda name: bool(name.strip())), FRAMES, min_size=1, max_size=4))
def test_any_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, form: str, stream: dict[str, np.ndarray]
) -> None:
    path = path_for(tmp_path_factory.mktemp("any"), form)
    written = [Document(name, None, *deduplicate(frames)) for name, frames in stream.items()]
    write_units(path, form, written, KNOWN)
    found = list(read_units(path, form))
    assert [document.id for document in found] == list(stream)
    for document, frames in zip(found, stream.values(), strict=True):
        assert document.durations is not None
        assert np.array_equal(expand(document.units, document.durations), frames)


# What other tools wrote: lines as their scripts print them.


def test_a_km_has_the_names_of_its_tsv(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(
        "/data/LibriSpeech\n84/121/84-121-0000.flac\t14400\n84/121/v1.2.flac\t640\n"
    )
    (tmp_path / "train_0_1.km").write_text("17 17 296 3\n4\n")
    found = list(read_units(tmp_path / "train_0_1.km", "km"))
    assert [document.id for document in found] == ["84/121/84-121-0000", "84/121/v1.2"]
    assert (
        found[0].units.tolist() == [17, 17, 296, 3]
        and found[0].durations is not None
        and found[0].durations.tolist() == [1] * 4
    )
    assert describe_source(tmp_path / "train_0_1.km", "km") == Described(deduplicated=False, timed=True)
    assert [document.id for document in read_units(tmp_path / "train_0_1.km", "km", stem=True)] == [
        "84-121-0000",
        "v1.2",
    ]
    (tmp_path / "train.tsv").rename(tmp_path / "other.tsv")
    assert len(list(read_units(tmp_path / "train_0_1.km", "km", tsv=str(tmp_path / "other.tsv")))) == 2
    with pytest.raises(
        ValueError, match=r"train_0_1.km: no .*train.tsv to name its lines; say where it is \(tsv=…\)"
    ):
        list(read_units(tmp_path / "train_0_1.km", "km"))


def test_gslm_lines_do_not_say_what_a_unit_is_until_someone_does(tmp_path: Path) -> None:
    # lines from Windows end otherwise
    (tmp_path / "units").write_text("LJ001-0001|71 71 9\r\nLJ001-0002|5 6\r\n")
    assert guess_format(tmp_path / "units") == "gslm"
    plain = list(read_units(tmp_path / "units", "gslm"))
    assert [(document.id, document.units.tolist(), document.durations) for document in plain] == [
        ("LJ001-0001", [71, 71, 9], None),
        ("LJ001-0002", [5, 6], None),
    ]
    assert describe_source(tmp_path / "units", "gslm") == Described()
    timed = next(read_units(tmp_path / "units", "gslm", per_frame=True))
    assert timed.durations is not None and timed.durations.tolist() == [1, 1, 1]


def test_textlesslib_files_have_names_or_numbers_and_durations_or_none(tmp_path: Path) -> None:
    (tmp_path / "x.units").write_text("71 9\n5\n")
    assert [
        (document.id, document.durations) for document in read_units(tmp_path / "x.units", "textlesslib")
    ] == [
        ("0", None),
        ("1", None),
    ]
    (tmp_path / "x.f0s").write_text("not read")
    (tmp_path / "x.units").write_text("LJ001-0001\t71 9\nLJ001-0002\t5\n")
    (tmp_path / "x.durations").write_text("LJ001-0001\t2 3\nLJ001-0002\t1\n")
    assert (
        guess_format(tmp_path / "x.units") == "textlesslib"
        and describe_source(tmp_path / "x.units", "textlesslib").timed
    )
    found = list(read_units(tmp_path / "x.units", "textlesslib"))
    assert [document.durations.tolist() for document in found if document.durations is not None] == [
        [2, 3],
        [1],
    ]
    (tmp_path / "x.durations").write_text("LJ001-0002\t1\nLJ001-0001\t2 3\n")
    with pytest.raises(
        ValueError, match=r"x.durations: line 1: durations of 'LJ001-0002', expected those of 'LJ001-0001'"
    ):
        list(read_units(tmp_path / "x.units", "textlesslib"))


def test_slamkit_rows_lose_the_suffix_of_their_recordings(tmp_path: Path) -> None:
    features, tokens = tmp_path / "features.jsonl", tmp_path / "tokens.jsonl"
    features.write_text(
        '{"units": [3, 49], "duration": [1, 4], "file_name": "../audio/a.flac", "text": "ignored"}\n'
    )
    tokens.write_text('{"file_name": "../audio/a.flac", "audio_repr": "<Un3><Un49>"}\n')
    assert (guess_format(features), guess_format(tokens)) == ("slamkit-features", "slamkit-tokens")
    assert_same(
        list(read_units(features, "slamkit-features")),
        [Document("../audio/a", None, np.array([3, 49]), np.array([1, 4]))],
    )
    assert_same(
        list(read_units(tokens, "slamkit-tokens", stem=True)), [Document("a", None, np.array([3, 49]))]
    )


def test_what_slamkit_reads_is_what_is_written(tmp_path: Path) -> None:
    write_units(tmp_path / "t.jsonl", "slamkit-tokens", documents()[:1], KNOWN)
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert row == {
        "file_name": "84/121/84-121-0000.wav",
        "audio_repr": "<Un3><Un49><Un3>",
        "duration": [1, 4, 2],
    }
    write_units(tmp_path / "f.jsonl", "slamkit-features", documents()[:1], KNOWN)
    row = json.loads((tmp_path / "f.jsonl").read_text())
    assert row == {"units": [3, 49, 3], "duration": [1, 4, 2], "file_name": "84/121/84-121-0000.wav"}


@pytest.mark.parametrize("key", ["hubert", "cpc_km100", "hubert_km100", "vqvae256", "codes"])
def test_resynthesis_lines_are_python_dicts_or_json_under_any_of_the_usual_keys(
    tmp_path: Path, key: str
) -> None:
    row = {"audio": "data/LJSpeech-1.1/wavs_16khz/LJ001-0011.wav", key: "71 86 86", "duration": 0.06}
    for text in (f"{row!r}\n", json.dumps(row) + "\n"):
        (tmp_path / "val.txt").write_text(text)
        assert guess_format(tmp_path / "val.txt") == "resynthesis"
        found = list(read_units(tmp_path / "val.txt", "resynthesis", stem=True))
        assert_same(found, [Document("LJ001-0011", None, np.array([71, 86, 86]), np.ones(3))])


def test_what_speech_resynthesis_reads_is_what_is_written(tmp_path: Path) -> None:
    write_units(tmp_path / "train.txt", "resynthesis", documents()[:1], KNOWN)
    row = ast.literal_eval((tmp_path / "train.txt").read_text())
    assert row == {
        "audio": "84/121/84-121-0000.wav",
        "hubert": "3 49 49 49 49 3 3",
        "duration": 0.28,
    }  # 7 frames at 25 Hz


def test_what_fairseq_reads_is_what_is_written(tmp_path: Path) -> None:
    write_units(tmp_path / "train.km", "km", documents()[:1], KNOWN)
    assert (tmp_path / "train.km").read_text() == "3 49 49 49 49 3 3\n"
    # 7 frames at 25 Hz of 16 kHz
    assert (tmp_path / "train.tsv").read_text() == ".\n84/121/84-121-0000.wav\t4480\n"


def test_resynthesis_lines_are_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "val.txt").write_text(f"{{'audio': open({str(trap)!r}, 'w').name, 'hubert': '1'}}\n")
    with pytest.raises(
        ValueError, match=r"val.txt: line 1: no Python literal \(ValueError\), expected a dict"
    ):
        list(read_units(tmp_path / "val.txt", "resynthesis"))
    with pytest.raises(ValueError, match="its format is not clear"):
        guess_format(tmp_path / "val.txt")
    assert not trap.exists()
    (tmp_path / "deep.txt").write_text("{'audio': " + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(ValueError, match="deep.txt: line 1: no Python literal"):
        list(read_units(tmp_path / "deep.txt", "resynthesis"))


def test_codec_arrays_are_levels_by_frames_in_folders_or_alone(tmp_path: Path) -> None:
    (tmp_path / "codes/84").mkdir(parents=True)
    np.save(tmp_path / "codes/84/a.npy", np.arange(8).reshape(1, 2, 4))  # a batch of one, as EnCodec gives it
    np.save(tmp_path / "codes/b.npy", np.array([[7, 6], [5, 4]], np.int16))
    np.save(tmp_path / "one.npy", np.array([3, 1, 2]))
    found = list(read_units(tmp_path / "codes", "codec"))
    assert [document.id for document in found] == ["b", "84/a"]
    assert found[0].units.tolist() == [[7, 5], [6, 4]] and found[1].units.tolist() == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    assert describe_source(tmp_path / "codes", "codec") == Described(
        num_levels=2, deduplicated=False, timed=True
    )
    assert (guess_format(tmp_path / "codes"), guess_format(tmp_path / "one.npy")) == ("codec", "codec")
    assert_same(
        list(read_units(tmp_path / "one.npy", "codec")),
        [Document("one", None, np.array([3, 1, 2]), np.ones(3))],
    )


def test_what_codecs_read_is_what_is_written(tmp_path: Path) -> None:
    write_units(
        tmp_path / "out",
        "codec",
        [Document("a/b", None, np.array([[1, 2], [3, 4], [5, 6]]), np.ones(3))],
        KNOWN,
    )
    assert np.load(tmp_path / "out/a/b.npy").tolist() == [[1, 3, 5], [2, 4, 6]]
    assert np.load(tmp_path / "out/a/b.npy").dtype == np.int16


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise AssertionError('a pickle was executed')",))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            np.array([_Trap()], dtype=object),
            "cannot be read as a .npy of numbers .*; pickled arrays are refused",
        ),
        (np.zeros((2, 3)), "float64 codes, expected whole numbers"),
        (np.array([[1, -1]]), "has the code -1"),
        (np.zeros((2, 0), int), r"codes of shape \[2, 0\] are empty"),
        (np.zeros((2, 2, 2), int), r".*shape \[2, 2, 2\], expected \[levels, frames\]"),
        (np.zeros((500, 4), int), ".*would have 500 levels; expected .* transpose it"),
    ],
)
def test_codec_arrays_that_are_no_codes_are_named(tmp_path: Path, codes: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", codes, allow_pickle=True)
    with pytest.raises(ValueError, match=f"a.npy: {message}"):
        list(read_units(tmp_path, "codec"))


def test_codec_arrays_of_other_levels_than_the_first_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), int))
    np.save(tmp_path / "b.npy", np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="b.npy: 4 levels of units, expected 2 as in the rest"):
        list(read_units(tmp_path, "codec"))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:90])
    with pytest.raises(ValueError, match=r"a.npy: cannot be read as a .npy"):
        list(read_units(tmp_path, "codec"))


def test_datasets_of_others_are_read_by_their_column_names(tmp_path: Path) -> None:
    # [levels][steps], seconds
    table = pa.table({"file_name": ["a/b.flac"], "codes": [[[1, 2, 3], [4, 5, 6]]], "duration": [1.5]})
    pq.write_table(table, tmp_path / "train-00000.parquet")
    assert guess_format(tmp_path) == "parquet"
    assert_same(
        list(read_units(tmp_path, "parquet", levels_first=True)),
        [Document("a/b", None, np.array([[1, 4], [2, 5], [3, 6]]))],
    )
    assert describe_source(tmp_path, "parquet", levels_first=True) == Described(num_levels=2)
    pq.write_table(pa.table({"key": ["x"], "km": [[7]], "split": ["dev"]}), tmp_path / "other.parquet")
    found = list(read_units(tmp_path / "other.parquet", "parquet", ids="key", units="km"))
    assert_same(found, [Document("x", "dev", np.array([7]))])
    with pytest.raises(
        ValueError,
        match=r"no column of ids, expected id or .*; it has key string, km list<.*>, split string \(say "
        r"which with ids=…\)",
    ):
        list(read_units(tmp_path / "other.parquet", "parquet"))


def test_parquet_keeps_splits_and_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("units.formats.parquet.GROUP_UNITS", 5)
    stream = [
        Document(f"u{i}", "dev" if i % 2 else None, np.arange(i + 1), np.full(i + 1, i + 1)) for i in range(9)
    ]
    write_units(tmp_path / "a.parquet", "parquet", stream, KNOWN)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups > 3
    assert_same(list(read_units(tmp_path / "a.parquet", "parquet")), stream)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b"], "units": [[1], []]}, "row 1: its units are empty"),
        ({"id": ["a", None], "units": [[1], [2]]}, "row 1: has no id"),
        ({"id": ["a", "b"], "units": [[1], None]}, "row 1: its units are empty"),
        ({"id": ["a", "b"], "units": [[1], [2, None]]}, "row 1: its units are int64 with nulls"),
        ({"id": ["a", "b"], "units": [[1], [-2]]}, "row 1: its units have -2"),
        ({"id": ["a"], "units": [[1.0]]}, "row 0: its units are double, expected whole numbers"),
        ({"id": ["a"], "units": [[[1, 2], [3]]]}, "row 0: its lists of units differ in length"),
        (
            {"id": ["a"], "units": [[list(range(100))]]},
            "row 0: units of 100 levels, .* say levels_first=true",
        ),
        ({"id": ["a"], "units": [[1]], "durations": [[1, 2]]}, "row 0: 2 durations for 1 units"),
        ({"id": ["a", "a"], "units": [[1], [2]]}, "row 1: a second utterance named 'a', expected each once"),
    ],
)
def test_rows_that_are_no_units_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet: {message}"):
        list(read_units(tmp_path / "a.parquet", "parquet"))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("id,units\n")
    with pytest.raises(ValueError, match=r"a.parquet: not a Parquet file"):
        list(read_units(tmp_path / "a.parquet", "parquet"))


FEATURES = '{"units": [3], "duration": [1], "file_name": "a"}'


@pytest.mark.parametrize(
    ("form", "line", "message"),
    [
        ("gslm", b"b|3 -1", "unit 1 .* is '-1', expected a whole number that is not negative"),
        ("gslm", b"b|3 1.0", "unit 1 .* is '1.0'"),
        ("gslm", b"b|3 1_0", "unit 1 .* is '1_0'"),
        ("gslm", "b|3 ٣".encode(), "unit 1 .* is '٣'"),
        ("gslm", b"b|3,4", "unit 0 .* is '3,4', .*; separate them by spaces, not commas"),
        ("gslm", b"b|9999999999", "unit 0 .* is '9999999999'"),
        ("gslm", b"b|", "has no units"),
        ("gslm", b"|3", "the name before '|' is empty"),
        ("gslm", b"3 4", "0 of '|', expected one"),
        ("gslm", b"b|c|3", "2 of '|', expected one"),
        ("gslm", b"", "is empty, expected an utterance"),
        ("gslm", b"b|3 \x004", "has a NUL byte"),
        ("gslm", b"b\xff|3", r"not UTF-8 text \(invalid start byte at byte 1\)"),
        ("gslm", b"a|4", r"a second utterance named 'a', expected each once \(first: .*: line 1\)"),
        ("textlesslib", b"\t3", "the name before the tab is empty"),
        ("textlesslib", b"b\t3\t4", r"unit 0 .* is '3\\t4'"),
        ("slamkit-features", b"{", "not valid JSON"),
        ("slamkit-features", b"[1]", "a list, expected a JSON object"),
        (
            "slamkit-features",
            b'{"duration": [1], "file_name": "b"}',
            "'units': the units are missing, expected a list",
        ),
        (
            "slamkit-features",
            b'{"units": [1, true], "duration": [1, 1], "file_name": "b"}',
            "'units': unit 1 .* is True",
        ),
        (
            "slamkit-features",
            b'{"units": [1.0], "duration": [1], "file_name": "b"}',
            "'units': unit 0 .* is 1.0",
        ),
        ("slamkit-features", b'{"units": [], "duration": [], "file_name": "b"}', "'units': has no units"),
        (
            "slamkit-features",
            b'{"units": [1, 2], "duration": [1], "file_name": "b"}',
            "1 durations for 2 units",
        ),
        (
            "slamkit-features",
            b'{"units": [1], "duration": [0], "file_name": "b"}',
            "duration 0 .* is 0 frames, expected 1 to 65535",
        ),
        ("slamkit-features", b'{"units": [1], "duration": [1]}', "'file_name' is missing"),
        ("slamkit-features", b'{"units": [1], "duration": [1], "file_name": "\\ud800"}', "the name .* UTF-8"),
        (
            "slamkit-tokens",
            b'{"file_name": "b", "audio_repr": "<text>hi<speech><Un3>"}',
            "'audio_repr' has '<text>hi<speech>', expected",
        ),
        (
            "slamkit-tokens",
            b'{"file_name": "b", "audio_repr": "<Un3>", "duration": [1]}',
            "has durations, expected that there are none",
        ),
        ("resynthesis", b"data/a.wav", r"no Python literal \(ValueError\)"),
        ("resynthesis", b"[1]", "is a list, expected a dict"),
        (
            "resynthesis",
            b"{'audio': 'b.wav', 'phone': '1'}",
            "no units, its keys are audio, phone; expected one of hubert, codes",
        ),
        (
            "resynthesis",
            b"{'audio': 'b.wav', 'hubert': '1', 'codes': '2'}",
            r"units under hubert and codes; .* \(say which with key=…\)",
        ),
        ("resynthesis", b"{'audio': 'b.wav', 'hubert': '1 x'}", "'hubert': label 1 .* is 'x'"),
        ("resynthesis", b"{'audio': 3, 'hubert': '1'}", "'audio' is 3, expected the path of a recording"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, form: str, line: bytes, message: str) -> None:
    good = {
        "gslm": b"a|3",
        "textlesslib": b"a\t3",
        "slamkit-features": FEATURES.encode(),
        "slamkit-tokens": b'{"file_name": "a", "audio_repr": "<Un3>"}',
        "resynthesis": b"{'audio': 'a.wav', 'hubert': '3'}",
    }
    (tmp_path / "file").write_bytes(good[form] + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"file: line 2: {message}".replace("|", r"\|")):
        list(read_units(tmp_path / "file", form))


@pytest.mark.parametrize(
    ("labels", "tsv", "message"),
    [
        ("1\n2\n", "/\na.wav\t1\n", r"a.km: line 2: nothing in .*a.tsv belongs to this and 0 lines after it"),
        (
            "1\n",
            "/\na.wav\t1\nb.wav\t1\nc.wav\t1\n",
            r"a.tsv: line 3: nothing in .*a.km belongs to this and 1 lines after it",
        ),
        ("1\n", "a.wav\t1\n", r"a.tsv: line 1: is an utterance, expected the root folder"),
        ("1\n", "/\na.wav 1\n", r"a.tsv: line 2: expected path<TAB>samples, got 'a.wav 1'"),
        ("1\n", "/\n.wav\t1\n", r"a.tsv: line 2: the name is empty"),
        ("1\n2\n", "/\na.wav\t1\na.wav\t1\n", r"a.km: line 2: a second utterance named 'a'"),
        ("1\n\n", "/\na.wav\t1\nb.wav\t1\n", r"a.km: line 2: is empty"),
        ("", "/\na.wav\t1\n", r"a.km: is empty, expected a line for each utterance"),
        ("1 x\n", "/\na.wav\t1\n", r"a.km: line 1: label 1 \(from 0\) is 'x'"),
    ],
)
def test_labels_and_names_that_do_not_match_are_named(
    tmp_path: Path, labels: str, tsv: str, message: str
) -> None:
    (tmp_path / "a.km").write_text(labels)
    (tmp_path / "a.tsv").write_text(tsv)
    with pytest.raises(ValueError, match=message):
        list(read_units(tmp_path / "a.km", "km"))


def test_durations_of_more_or_fewer_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.units").write_text("1 2\n3\n")
    (tmp_path / "x.durations").write_text("1 2\n")
    with pytest.raises(ValueError, match=r"x.durations: ends before .*x.units: line 2"):
        list(read_units(tmp_path / "x.units", "textlesslib"))
    (tmp_path / "x.durations").write_text("1 2\n3\n4\n")
    with pytest.raises(
        ValueError, match=r"x.durations: line 3: durations of an utterance that .*x.units does not have"
    ):
        list(read_units(tmp_path / "x.units", "textlesslib"))
    (tmp_path / "x.durations").write_text("1 70000\n3\n")
    with pytest.raises(
        ValueError, match=r"x.durations: line 1: duration 1 \(from 0\) is 70000 frames, expected 1 to 65535"
    ):
        list(read_units(tmp_path / "x.units", "textlesslib"))


def test_what_a_sidecar_says_is_held_against_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_units(path, "gslm", documents(), KNOWN)
    assert (
        (sidecar := read_sidecar(path)) is not None
        and sidecar.num_documents == 3
        and sidecar.format == "gslm"
    )
    with pytest.raises(
        ValueError, match=r"a.txt.meta.json: says that a.txt is gslm, not textlesslib; correct one of the two"
    ):
        read_units(path, "textlesslib")
    lines = path.read_text().splitlines(keepends=True)
    durations = (tmp_path / "a.txt.durations").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    (tmp_path / "a.txt.durations").write_text("".join(durations[:2]))
    with pytest.raises(
        ValueError, match=r"a.txt: 2 utterances, expected 3 \(a.txt.meta.json\); it was changed"
    ):
        list(read_units(path, "gslm"))
    path.write_text(lines[0].replace("49", "500"))
    with pytest.raises(
        ValueError, match=r"a.txt: line 1: has the unit 500, expected 0 to 499 of codebook c0de"
    ):
        list(read_units(path, "gslm"))
    (tmp_path / "a.txt.durations").unlink()
    path.write_text(lines[0])
    with pytest.raises(
        ValueError,
        match=r"a.txt: line 1: has no durations, expected that they are known, as the first or "
        r"a.txt.meta.json",
    ):
        list(read_units(path, "gslm"))
    sidecar_path(path).write_text('{"format": "gslm", "codebok": "c0de"}')
    with pytest.raises(ValueError, match=r"a.txt.meta.json: codebok: unknown key; did you mean 'codebook'"):
        read_sidecar(path)


@pytest.mark.parametrize(
    ("form", "stream", "message"),
    [
        ("gslm", [], "there are no documents to write"),
        (
            "gslm",
            [("a|b", [1], None)],
            r"document 'a\|b': its id has '\|', which gslm cannot write; export it as parquet",
        ),
        ("km", [("a\tb", [1], [1])], "its id has '.t', which km cannot write"),
        ("codec", [("../a", [1], [1])], "document '../a': its id is no name for a file"),
        ("gslm", [("a", [1], None), ("b", [], None)], "document 'b': expected units .* at least one"),
        (
            "gslm",
            [("a", [1], None), ("b", [500], None)],
            "document 'b': has the unit 500, expected 0 to 499 of codebook c0de",
        ),
        (
            "gslm",
            [("a", [1], None), ("b", [1.5], None)],
            "document 'b': expected units that are whole numbers",
        ),
        ("gslm", [("a", [1], [1]), ("b", [1], None)], "document 'b': has no durations, unlike the first"),
        ("km", [("a", [1], [1]), ("b", [1], None)], "document 'b': has no durations, unlike the first"),
        ("gslm", [("a", [1], [0])], "document 'a': duration 0 .* is 0 frames"),
        (
            "gslm",
            [("a", [1], None), ("b", [[1, 2]], None)],
            "document 'b': 2 levels of units, expected 1 as in the first",
        ),
        (
            "gslm",
            [("a", [1], None), ("b", [1], None), ("a", [2], None)],
            "documents 0 and 2 .* have the same id",
        ),
    ],
)
@pytest.mark.parametrize("folder", ["out"])
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, folder: str, form: str, stream: list[tuple[str, Any, Any]], message: str
) -> None:
    written = [
        Document(name, None, np.array(units), None if times is None else np.array(times))
        for name, units, times in stream
    ]
    with pytest.raises(ValueError, match=message):
        write_units(tmp_path / folder / "file", form, written, KNOWN)
    assert not (tmp_path / folder).exists() or not any((tmp_path / folder).iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_written_over(tmp_path: Path, form: str) -> None:
    write_units(path_for(tmp_path, form), form, documents(), KNOWN)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="exists; remove it or choose another name"):
        write_units(path_for(tmp_path, form), form, documents(), KNOWN)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_users_tsv_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("mine")
    with pytest.raises(ValueError, match=r"train.tsv: exists"):
        write_units(tmp_path / "train.km", "km", documents(), KNOWN)
    with pytest.raises(ValueError, match=r"dev.tsv: km needs this name for the file that goes with it"):
        write_units(tmp_path / "dev.tsv", "km", documents(), KNOWN)


@pytest.mark.parametrize("form", FORMATS)
def test_documents_stream_and_a_source_that_breaks_off_leaves_nothing(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("units.formats.parquet.GROUP_ROWS", 2)
    made: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[Document]:
        for i in range(50):
            units = np.array([i])
            made.append(weakref.ref(units))
            # the first, which says what the rest must be like, the last two, and those of a group of Parquet
            assert sum(units() is not None for units in made) <= 5
            yield Document(f"u{i}", None, units, np.array([1]))
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="the source broke off"):
        write_units(path_for(tmp_path, form), form, stream(), KNOWN)
    assert len(made) == 50 and not any(tmp_path.iterdir())


def test_a_reader_gives_the_first_document_before_it_sees_the_last(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a|1 2\n" * 5 + "broken\n")
    assert next(read_units(tmp_path / "a.txt", "gslm")).units.tolist() == [1, 2]


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_end_in_a_message_that_names_them(tmp_path: Path, form: str) -> None:
    path, rng = path_for(tmp_path, form), random.Random(form)
    write_units(path, form, documents(), KNOWN)
    files = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    for _ in range(60):
        file = rng.choice(list(files))
        data, place = bytearray(files[file]), rng.randrange(len(files[file]))
        data[place : place + rng.choice([0, 1, 5, len(data)])] = rng.randbytes(rng.choice([0, 1, 5]))
        file.write_bytes(data)
        message = str(path)
        try:
            for document in read_units(path, guess_format(path)):
                assert document.units.min() >= 0 and document.id
        except ValueError as error:
            message = str(error)
        assert message.startswith(str(tmp_path)), file
        file.write_bytes(files[file])


def test_formats_that_are_not_clear_or_not_there_are_told_with_all_names(tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text("1 2 3\n")
    with pytest.raises(
        ValueError, match=r"numbers.txt: its format is not clear .*: format=km\|gslm\|textlesslib"
    ):
        guess_format(tmp_path / "numbers.txt")
    with pytest.raises(ValueError, match=r"no such file or folder of units"):
        guess_format(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no format 'glsm'; did you mean 'gslm'\?"):
        read_units(tmp_path / "numbers.txt", "glsm")
    with pytest.raises(ValueError, match=r"format gslm has no option 'tsv'; it has durations, per_frame"):
        read_units(tmp_path / "numbers.txt", "gslm", tsv="x")
    (tmp_path / "named.txt").write_text("a\t1 2\n")
    assert guess_format(tmp_path / "named.txt") == "textlesslib"


@pytest.mark.parametrize("form", FORMATS)
def test_a_corpus_is_exported_with_its_codebook_and_packed_to_the_same_frames(
    tmp_path: Path, form: str
) -> None:
    stream = [document._replace(split="dev" if i else "train") for i, document in enumerate(documents())]
    vocabulary = Vocabulary(num_units=500)
    given_as = {"codebook": "c0de", "frame_rate_hz": 50.0, "deduplicated": True, "vocabulary": vocabulary}
    write_corpus(tmp_path / "corpus", stream, {}, {}, **given_as)  # type: ignore[arg-type]
    corpus = UnitCorpus(tmp_path / "corpus")
    path = path_for(tmp_path, form)
    assert export_corpus(corpus.folder, path, form, split="dev")["num_documents"] == 2
    described = describe_source(path, form)
    assert (described.codebook, described.source, described.frame_rate_hz) == (
        "c0de",
        corpus.fingerprint,
        50.0,
    )
    found = {document.id: document for document in read_units(path, form)}
    for i in corpus.documents("dev").tolist():
        document = found.pop(corpus.ids[i])
        assert document.durations is not None
        assert np.array_equal(expand(document.units, document.durations), corpus.frames(i))
        assert form != "parquet" or document.split == "dev"
    assert not found


def test_a_corpus_of_speech_and_text_is_not_exported(tmp_path: Path) -> None:
    vocabulary = Vocabulary(num_units=2, text=("a",), layout="interleaved")
    stream = [Document("x", None, np.array([3, 0, 4, 2]))]
    write_corpus(
        tmp_path,
        stream,
        {},
        {},
        vocabulary=vocabulary,
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=True,
        timed=False,
    )
    with pytest.raises(ValueError, match=r"has text among its units \(interleaved\)"):
        export_corpus(tmp_path, tmp_path / "a.km", "km")


def test_parquet_of_two_codebooks_in_a_folder_is_refused(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"source": "f00d"}), ("c", {"codebook": "0ther"})):
        stream = [document._replace(id=name + document.id) for document in documents()]
        write_units(tmp_path / f"{name}.parquet", "parquet", stream, KNOWN.model_copy(update=changes))
    with pytest.raises(
        ValueError, match=r"a.parquet and .*c.parquet: codebook 'c0de' and '0ther'; expected the same units"
    ):
        describe_source(tmp_path, "parquet")
    (tmp_path / "c.parquet").unlink()
    assert describe_source(tmp_path, "parquet").model_dump(include=set(Described.model_fields)) == {
        **KNOWN.model_dump(),
        "source": None,
    }
    assert len(list(read_units(tmp_path, "parquet"))) == 6
    pq.write_table(pa.table({"id": ["x"], "units": [[1]], "durations": [[1]]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: codebook 'c0de' and None"):
        describe_source(tmp_path, "parquet")


@pytest.mark.parametrize("deduplicated", [True, False])
def test_per_frame_does_not_overrule_a_sidecar(tmp_path: Path, deduplicated: bool) -> None:
    path = tmp_path / "a.txt"
    stream = [document._replace(durations=None) for document in documents()]
    write_units(path, "gslm", stream, KNOWN.model_copy(update={"timed": False, "deduplicated": deduplicated}))
    with pytest.raises(
        ValueError, match=r"a.txt: its units are .* by its own account; leave per_frame = .* out"
    ):
        describe_source(path, "gslm", per_frame=deduplicated)
    assert describe_source(path, "gslm", per_frame=not deduplicated).deduplicated is deduplicated


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("gslm", {"durations": 5}, "format gslm: option durations is 5, expected a text"),
        ("km", {"tsv": 5}, "format km: option tsv is 5, expected a text"),
        ("gslm", {"per_frame": "no"}, "format gslm: option per_frame is 'no', expected true or false"),
        ("km", {"stem": 1}, "format km: option stem is 1, expected true or false"),
        (
            "parquet",
            {"levels_first": "yes"},
            "format parquet: option levels_first is 'yes', expected true or false",
        ),
    ],
)
def test_options_of_another_type_are_named(
    tmp_path: Path, form: str, options: dict[str, Any], message: str
) -> None:
    for read in (describe_source, read_units, fingerprint_source):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a", form, **options)


@pytest.mark.parametrize("form", FORMATS)
def test_the_fingerprint_of_a_source_is_of_all_that_is_read(tmp_path: Path, form: str) -> None:
    path = path_for(tmp_path, form)
    write_units(path, form, documents(), KNOWN)
    (tmp_path / "beside").write_text("not read")
    first = fingerprint_source(path, form)
    assert fingerprint_source(path, form) == first
    for file in [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.name != "beside"]:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert fingerprint_source(path, form) != first, file
        file.write_bytes(before)
    (tmp_path / "beside").write_text("still not read")
    assert fingerprint_source(path, form) == first
