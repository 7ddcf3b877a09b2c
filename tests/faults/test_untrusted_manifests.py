"""Manifests, lists, transcripts and alignments that were damaged or made up: ValueErrors that name the file,
and never anything else."""

import json
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.manifest_table import SCHEMA
from pretrain.data.sources.lists import attach_alignments
from pretrain.data.sources.sources import name_speakers, read_sources, require_distinct_ids
from pretrain.data.utterance import phone_frames


def row(number: int, **columns: Any) -> dict[str, Any]:
    return {
        "id": f"u{number}",
        "path": f"/a/u{number}.wav",
        "start": 0,
        "num_samples": 16000 + number,
        "sample_rate": 16000,
        "split": "train" if number % 3 else "dev",
        "speaker": f"s{number % 5}",
        "text": "hällo wörld",
        "phones": [(0.0, 0.1, "a"), (0.1, 0.5, "b")],
        "words": [(0.0, 0.5, "hällo")],
        **columns,
    }


def everything(folder: Path) -> Any:
    """All that can be read of a manifest."""
    manifest = Manifest(folder)
    flags = manifest.has_text, manifest.has_phones, manifest.has_words
    some = [table.to_pydict() for _, table in manifest.select("train").blocks(["id", "num_samples"])]
    frames = [phone_frames(utterance.phones or [], utterance.num_frames).tolist() for utterance in manifest]
    return (
        list(manifest),
        manifest.lengths.tolist(),
        manifest.ids,
        flags,
        sorted(manifest.splits),
        some,
        frames,
    )


def test_wherever_a_manifest_is_flipped_or_cut_it_is_told_or_nothing_changed(tmp_path: Path) -> None:
    """In 400 places, half of them in the last kilobytes: there it says where everything is, and Arrow
    believes it."""
    write_manifest(tmp_path, [row(n) for n in range(30)], {}, {})
    path = tmp_path / "manifest.parquet"
    whole, expected, draw, told = path.read_bytes(), everything(tmp_path), random.Random(0), 0
    for turn in range(400):
        damaged = bytearray(whole)
        if turn % 8 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(draw.choice([1, 4])):
                damaged[draw.randrange(len(damaged) if turn % 2 else 2000) - 2000 * (1 - turn % 2)] = (
                    draw.randrange(256)
                )
        path.write_bytes(damaged)
        try:
            assert everything(tmp_path) == expected  # bytes that mean nothing, or were drawn as they are
        except ValueError as error:
            told += 1
            assert str(path) in str(error)  # noqa: PT017 - both outcomes are right
    assert told > 380


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """A manifest of 5 rows as somebody else would have written it."""
    write_manifest(folder, [row(n) for n in range(5)], {}, {})
    path = folder / "manifest.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["footer"]
    (folder / "meta.json").write_text(json.dumps(meta))
    return path


def column(name: str, values: list[Any], kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Replace a column."""
    kind = kind or SCHEMA.field(name).type

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(
            table.schema.get_field_index(name), pa.field(name, kind), pa.array(values, kind)
        )

    return change


def invalid_text(table: pa.Table) -> pa.Table:
    text = pa.Array.from_buffers(
        pa.string(), 5, [None, pa.py_buffer(np.arange(6, dtype=np.int32)), pa.py_buffer(b"\xff" * 5)]
    )
    return table.set_column(table.schema.get_field_index("id"), pa.field("id", pa.string()), text)


PHONE = {"start": 0.0, "end": 0.1, "phone": "a"}
LATER = {"start": 0.2, "end": 0.3, "phone": "b"}
WRONG: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "no id": (lambda table: table.drop_columns(["id"]), "no column 'id'; it has path, start"),
    "no rate": (lambda table: table.drop_columns(["sample_rate"]), "no column 'sample_rate'"),
    "ids are numbers": (
        column("id", list(range(5)), pa.int64()),
        "column 'id' is of int64; string is needed",
    ),
    "rates are floats": (
        column("sample_rate", [16e3] * 5, pa.float64()),
        "column 'sample_rate' is of double; int32",
    ),
    "phones are text": (column("phones", ["a"] * 5, pa.string()), "column 'phones' is of string; list<"),
    "an id is null": (column("id", [None, "b", "c", "d", "e"]), "row 0, id None: has no id"),
    "a path is null": (column("path", [None, "b", "c", "d", "e"]), "has no path"),
    "a length is null": (column("num_samples", [1, None, 3, 4, 5]), "has no num_samples"),
    "a start is null": (column("start", [0, None, 3, 4, 5]), "row 1, id 'u1': has no start"),
    "a rate is 0": (column("sample_rate", [1, 0, 1, 1, 1]), "16001 samples .*at 0 Hz"),
    "a rate is negative": (column("sample_rate", [1, -2, 1, 1, 1]), "16001 samples .*at -2 Hz"),
    "a length is negative": (column("num_samples", [-7] * 5), "-7 samples"),
    "a length is huge": (column("num_samples", [2**62] * 5), "4611686018427387904 samples"),
    "a start is negative": (column("start", [-3] * 5), "16000 samples from -3 on"),
    "phones overlap": (
        column("phones", [[LATER, PHONE]] * 5),
        "row 0, id 'u0': phones are not in order, Phone.* after 0.3 s",
    ),
    "a phone ends early": (column("phones", [[{**PHONE, "end": -1.0}]] * 5), "phones are not in order"),
    "a phone has no end": (column("phones", [[{**PHONE, "end": None}]] * 5), "phones are not in order"),
    "a phone is null": (column("phones", [[None]] * 5), "phones are not in order"),
    "a phone is not a number": (
        column("phones", [[{**PHONE, "start": float("nan")}]] * 5),
        "phones are not in order",
    ),
    "words overlap": (
        column("words", [[{"start": t, "end": 9.0, "word": "a"} for t in (1.0, 2.0)]] * 5),
        "words are not in order",
    ),
    "no UTF-8": (invalid_text, "missing or damaged .*UTF"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_no_manifest_holds_is_told_with_the_file_and_the_row(tmp_path: Path, kind: str) -> None:
    change, message = WRONG[kind]
    path = rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=message) as refusal:
        everything(tmp_path)
    assert str(path) in str(refusal.value)


def test_columns_that_need_not_be_there_may_be_absent(tmp_path: Path) -> None:
    optional = [field.name for field in SCHEMA if field.nullable]
    rewritten(tmp_path, lambda table: table.drop_columns(optional))
    manifest = Manifest(tmp_path)
    assert manifest[0].phones is None and manifest.splits == set() and len(list(manifest)) == 5


def test_a_root_that_is_no_folder_is_told(tmp_path: Path) -> None:
    write_manifest(tmp_path, [row(0)], {}, {})
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"root": 3}))
    with pytest.raises(ValueError, match="meta.json: root is 3"):
        Manifest(tmp_path)


# Sources


numbers = st.one_of(st.integers(), st.floats(), st.just(10**400), st.just(1e308))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
triples = st.lists(st.tuples(numbers, numbers, st.text(max_size=3)), max_size=4)
audio_rows = st.fixed_dictionaries(
    {"audio_filepath": st.one_of(st.text(max_size=12), anything)},
    optional={
        "id": anything,
        "text": anything,
        "speaker": anything,
        "split": anything,
        "offset": numbers,
        "duration": numbers,
        "phones": st.one_of(triples, anything),
        "words": st.one_of(triples, anything),
    },
)


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


def use(path: Path) -> None:
    """All that `index` does before it opens a recording."""
    candidates = read_sources([str(path)])
    require_distinct_ids(candidates)
    name_speakers(candidates, "(.)")
    for candidate in candidates:
        assert candidate.problem or candidate.id.encode().isascii() or candidate.id.encode()


def told_by_name(path: Path, data: bytes, use: Callable[[Path], None] = use) -> None:
    path.write_bytes(data)
    try:
        use(path)
    except ValueError as error:
        assert type(error) is ValueError, repr(error)  # noqa: PT017 - or nothing is wrong
        assert str(path.parent) in str(error) or "speaker_pattern" in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists")


fuzzed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(st.one_of(st.lists(st.one_of(audio_rows, anything), max_size=4).map(as_lines), st.binary(max_size=60)))
@example(b'{"audio_filepath": "\\ud800.wav"}')
@example(b'{"audio_filepath": "a.wav", "id": "\\u0000"}')
@example(b"[" * 100_000)
@example(b'{"audio_filepath": "a.wav", "id": ' + b"9" * 5000 + b"}")
@example(b"\xff")
def test_any_json_lines_are_read_or_told(folder: Path, data: bytes) -> None:
    told_by_name(folder / "l.jsonl", data)


@fuzzed
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4).map(
            lambda lines: "\n".join(lines).encode()
        ),
    )
)
@example(b"/root\na.wav\t" + b"9" * 5000)
@example("/root\na.wav\t٣".encode())
@example(b"/root\n../../a.wav\t5")
@example(b"/root\n\0.wav\t5")
@example(b"")
def test_any_tsv_is_read_or_told(folder: Path, data: bytes) -> None:
    told_by_name(folder / "l.tsv", data)
    (folder / "m.wrd").write_bytes(data)
    told_by_name(folder / "m.tsv", b"/root\na.wav\t5\nb.wav\t6")


alignment_rows = st.fixed_dictionaries(
    {"id": st.one_of(st.just("a"), anything)},
    optional={"phones": st.one_of(triples, anything), "words": triples},
)


@fuzzed
@given(
    st.one_of(st.lists(st.one_of(alignment_rows, anything), max_size=4).map(as_lines), st.binary(max_size=60))
)
def test_any_alignments_are_read_or_told(folder: Path, data: bytes) -> None:
    (folder / "a.tsv").write_text("/root\na.wav\t5")

    def align(path: Path) -> None:
        candidates = read_sources([str(folder / "a.tsv")])
        attach_alignments(candidates, str(path))
        for kind in (candidates[0].phones, candidates[0].words):
            times = [time for one in kind or [] for time in one[:2]]
            assert all(before <= after + 0.001 for before, after in pairwise(times))

    told_by_name(folder / "alignments.jsonl", data, align)


@fuzzed
@given(
    st.one_of(st.binary(max_size=60), st.text(st.sampled_from('a0.9," \n-e'), max_size=40).map(str.encode))
)
@example(b'a ",A," "0.1,1e999,0.2"')
@example(b'a ",A," "0.1.2,1,2"')
@example(b'a ",A," "nan,1,2"')
def test_any_transcripts_and_word_times_of_a_folder_are_read_or_told(folder: Path, data: bytes) -> None:
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "a.wav").touch()
    for name in ("x.trans.txt", "x.alignment.txt", "a.txt"):
        for other in corpus.glob("*.txt"):
            other.unlink()
        told_by_name(corpus / name, data, lambda path: use(path.parent))
    told_by_name(corpus / "x.alignment.txt", b'b ",A," "0.1,1,2"\n' + data, lambda path: use(path.parent))


def test_names_that_are_no_utf_8_and_links_in_a_circle_do_no_harm(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    (corpus / "a/b").mkdir(parents=True)
    for name in (b"a/x.wav", b"a/\xff.wav", b"a/b/\x1b[2J.wav"):
        soundfile.write(tmp_path / "x.wav", np.zeros(4000), 16000)
        os.rename(tmp_path / "x.wav", os.path.join(os.fsencode(corpus), name))
    for place, target in (
        ("a/up", corpus),
        ("a/b/itself", corpus / "a/b"),
        ("a/b/there", tmp_path / "other"),
    ):
        (corpus / place).symlink_to(target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/back").symlink_to(corpus / "a")
    os.mkfifo(corpus / "pipe.wav")
    os.mkfifo(corpus / "pipe.alignment.txt")
    os.mkfifo(corpus / "pipe.tar")
    keys: dict[str, Any] = {"dev_share": 0.0, "test_share": 0.0, "max_bad_share": 0.9}
    index(IndexConfig(source=str(corpus), out=str(tmp_path / "m"), **keys))
    assert Manifest(tmp_path / "m").ids == ["a/x"]
    left_out = [json.loads(line) for line in (tmp_path / "m/quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in left_out} == {
        "pipe": "no such file",
        "a/\\udcff": "has the id 'a/\\udcff', with control characters or no UTF-8; rename it",
        "a/b/\\x1b[2J": "has the id 'a/b/\\x1b[2J', with control characters or no UTF-8; rename it",
    }
    os.mkfifo(corpus / "pipe.trans.txt")
    with pytest.raises(ValueError, match=r"pipe.trans.txt: is no file"):
        read_sources([str(corpus)])
