import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.manifest import ROW_GROUP, Manifest, copy_manifest, write_manifest
from pretrain.data.manifest_table import take
from pretrain.data.utterance import Phone, Utterance, Word
from pretrain.store.artefact import commit


def row(name: str, **columns: Any) -> dict[str, Any]:
    return {
        "id": name,
        "path": f"/audio/{name}.wav",
        "start": 0,
        "num_samples": 16000,
        "sample_rate": 16000,
    } | columns


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        row(
            "a",
            split="train",
            speaker="x",
            text="one",
            phones=[(0.0, 0.5, "w"), (0.5, 1.0, "ʌ")],
            words=[(0.0, 1.0, "one")],
        ),
        row("b", start=800, num_samples=44100, sample_rate=44100, phones=[], words=[]),
    ]
    fingerprint = write_manifest(
        tmp_path, rows, {}, {}, [{"id": "c", "path": "/audio/c.wav", "reason": "is empty"}]
    )
    manifest = Manifest(tmp_path)
    assert manifest.fingerprint == fingerprint and len(manifest) == 2 and manifest.ids == ["a", "b"]
    phones = [Phone(0.0, 0.5, "w"), Phone(0.5, 1.0, "ʌ")]
    assert list(manifest) == [
        Utterance(
            "a", "/audio/a.wav", 0, 16000, 16000, "train", "x", "one", phones, words=[Word(0.0, 1.0, "one")]
        ),
        Utterance("b", "/audio/b.wav", 800, 44100, 44100, None, None, None, [], words=[]),
    ]
    assert manifest.has_text and manifest.has_phones and manifest.has_words and manifest.splits == {"train"}
    assert (
        tmp_path / "quarantine.jsonl"
    ).read_text() == '{"id": "c", "path": "/audio/c.wav", "reason": "is empty"}\n'


def test_meta_counts_utterances_hours_and_quarantine(tmp_path: Path) -> None:
    write_manifest(
        tmp_path, [row("a"), row("b", num_samples=8000, sample_rate=8000)], {"key": 1}, {"source": "f00d"}
    )
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["num_utterances"], meta["num_quarantined"], meta["parents"]) == (2, 0, {"source": "f00d"})
    assert meta["hours"] == pytest.approx(2 / 3600)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest("m", [row("a", path="audio/../a.wav")], {}, {})
    assert Manifest("m")[0].path == str(tmp_path / "a.wav")


def test_a_corpus_that_moves_keeps_its_fingerprint(tmp_path: Path) -> None:
    rows = [
        [row("a", path=f"{root}/x/a.wav"), row("b", path="/elsewhere/b.wav")]
        for root in ("/here", "/there", "/the")
    ]
    prints = [
        write_manifest(tmp_path / str(n), rows[n], {}, {}, root=root)
        for n, root in enumerate(["/here", "/there/", "/the"])
    ]
    assert len(set(prints)) == 1
    assert [u.path for u in Manifest(tmp_path / "1")] == ["/there/x/a.wav", "/elsewhere/b.wav"]
    meta = tmp_path / "1" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"root": "/new"}))
    moved = Manifest(tmp_path / "1").select(None)
    assert [u.path for u in moved] == ["/new/x/a.wav", "/elsewhere/b.wav"] and moved.fingerprint == prints[0]
    # /there is not below /the
    assert write_manifest(tmp_path / "3", rows[1], {}, {}, root="/the") != prints[0]


def test_the_fingerprint_follows_the_rows_and_nothing_else(tmp_path: Path) -> None:
    first = write_manifest(tmp_path / "1", [row("a")], {"seed": 1}, {})
    assert write_manifest(tmp_path / "2", [row("a")], {"seed": 2}, {}) == first
    assert write_manifest(tmp_path / "3", [row("a", num_samples=16001)], {"seed": 1}, {}) != first


def test_a_split_is_a_manifest_of_its_rows(tmp_path: Path) -> None:
    rows = [
        row(str(i), split="test" if i % 3 == 0 else "train", text="x" if i % 3 else None) for i in range(9)
    ]
    write_manifest(tmp_path, rows, {}, {})
    manifest = Manifest(tmp_path)
    test = manifest.select("test")
    assert test.ids == ["0", "3", "6"] and test.fingerprint == manifest.fingerprint and not test.has_text
    assert manifest.select(None) is manifest and manifest.has_text and len(manifest.select("train")) == 6
    with pytest.raises(ValueError, match=r"no utterances of split 'valid'; it has test, train"):
        manifest.select("valid")


def test_a_manifest_without_splits_says_so(tmp_path: Path) -> None:
    write_manifest(tmp_path, [row("a")], {}, {})
    with pytest.raises(ValueError, match=r"split 'train'; it has no splits"):
        Manifest(tmp_path).select("train")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), st.sampled_from([8000, 11025, 16000, 44100, 48000])),
        min_size=1,
        max_size=5,
    )
)
def test_lengths_are_those_of_the_utterances(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("m")
    write_manifest(
        folder, [row(str(i), num_samples=n, sample_rate=rate) for i, (n, rate) in enumerate(sizes)], {}, {}
    )
    manifest = Manifest(folder)
    assert manifest.lengths.dtype == np.int64
    assert (
        manifest.lengths.tolist() == [u.length for u in manifest] == [n * 16000 // rate for n, rate in sizes]
    )
    assert manifest.num_frames.tolist() == [u.num_frames for u in manifest]
    assert all(u.num_frames == max(0, (u.length - 400) // 320 + 1) for u in manifest if u.length >= 400)


def many(num_rows: int) -> Iterator[dict[str, Any]]:
    """Three splits, text in one of them, phones in one row; lengths that tell the row."""
    for i in range(num_rows):
        known = {"text": f"text {i}"} if i % 3 == 1 else {}
        known |= {"phones": [(0.0, 1.0, "a")]} if i == 2500 else {}
        yield row(
            f"u{i}",
            num_samples=400 + i,
            split=[None, "train", "dev"][i % 3],
            member_offset=512 * i,
            member_size=i,
            **known,
        )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three and a bit row groups, written from an iterator."""
    folder = tmp_path_factory.mktemp("large")
    write_manifest(folder, many(3 * ROW_GROUP + 77), {}, {})
    return Manifest(folder)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3 * ROW_GROUP + 76), min_size=1, max_size=20))
def test_rows_are_the_same_in_any_order_and_selection(large: Manifest, rows: list[int]) -> None:
    expected = [f"u{i}" for i in rows]
    assert [large[i].id for i in rows] == expected
    taken = large.take(np.array(rows))
    assert taken.ids == [u.id for u in taken] == expected
    assert taken.lengths.tolist() == [u.length for u in taken] == [400 + i for i in rows]
    assert taken.take(np.arange(len(rows))[::-1]).ids == expected[::-1]
    assert taken.has_text == any(i % 3 == 1 for i in rows) and taken.has_phones == (2500 in rows)
    assert taken.splits == {["train", "dev"][i % 3 - 1] for i in rows if i % 3}
    assert all(u.member == (512 * i, i) for i, u in zip(rows, taken, strict=True))


def test_a_large_manifest_selects_by_split(large: Manifest) -> None:
    assert (
        large.has_text
        and large.has_phones
        and large.splits == {"train", "dev"}
        and len(large) == 3 * ROW_GROUP + 77
    )
    dev, train = large.select("dev"), large.select("train")
    assert dev.ids == [f"u{i}" for i in range(2, len(large), 3)] and dev.splits == {"dev"}
    # row 2500 is of train
    assert not dev.has_text and train.has_text and not dev.has_phones and train.has_phones
    with pytest.raises(ValueError, match="no utterances of split 'dev'; it has train"):
        train.select("dev")
    with pytest.raises(IndexError):
        dev[len(dev)]
    assert dev[-1].id == dev.ids[-1]


def test_threads_may_read_at_once(large: Manifest) -> None:
    rows = np.random.default_rng(0).integers(0, len(large), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [u.id for u in pool.map(large.__getitem__, rows)] == [f"u{i}" for i in rows]


def test_opening_and_planning_decodes_no_row(large: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    manifest = Manifest(large.folder).select("train")
    plan = SpeechBatches(manifest, BatchConfig(min_seconds=0.025), 0).plan(0)
    assert sum(map(len, plan)) == len(manifest)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unique"):
        write_manifest(tmp_path, [row(str(i % 1500)) for i in range(1501)], {}, {})
    assert not (tmp_path / "meta.json").exists()


def test_a_manifest_written_before_tars_were_read_and_words_had_times_still_opens(tmp_path: Path) -> None:
    write_manifest(tmp_path, [row("a")], {}, {})
    path = tmp_path / "manifest.parquet"
    pq.write_table(
        pq.read_table(path).drop_columns(["member_offset", "member_size", "speaker", "words"]), path
    )
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["footer"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert not Manifest(tmp_path).has_words and Manifest(tmp_path).column("words").null_count == 1
    assert Manifest(tmp_path)[0] == Utterance("a", "/audio/a.wav", 0, 16000, 16000)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"manifest.parquet: missing or damaged"):
        Manifest(tmp_path)


def test_what_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such manifest"):
        Manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a complete manifest"):
        Manifest(tmp_path)
    (tmp_path / "x").touch()
    commit(tmp_path, "labels", {}, {}, ["x"])
    with pytest.raises(ValueError, match="is a 'labels'; a 'manifest' is needed"):
        Manifest(tmp_path)


def test_blocks_are_every_row_once_with_the_number_it_has_here(tmp_path: Path) -> None:
    count = 2 * ROW_GROUP + 300
    write_manifest(
        tmp_path, [row(f"u{n}", text=f"text {n}" if n % 2 else None) for n in range(count)], {}, {}
    )
    whole = Manifest(tmp_path)
    some = np.random.default_rng(0).permutation(count)[:900]
    twice = np.r_[np.arange(1, ROW_GROUP), 5]  # as many as the group has, and not those
    for manifest, groups in (
        (whole, 3),
        (whole.take(some), 3),
        (whole.take(twice), 1),
        (whole.take(np.array([5, 3, 2100])), 2),
        (whole.take(some[:0]), 0),
    ):
        blocks = list(manifest.blocks(["text", "id"]))
        assert len(blocks) == groups and sorted(n for rows, _ in blocks for n in rows) == list(
            range(len(manifest))
        )
        for rows, table in blocks:
            assert table.column_names == ["text", "id"]
            for number, name, text in zip(
                rows.tolist(), table["id"].to_pylist(), table["text"].to_pylist(), strict=True
            ):
                assert (manifest[number].id, manifest[number].text) == (name, text)


def test_a_copy_of_rows_is_the_manifest_that_they_alone_would_make(tmp_path: Path) -> None:
    rows = [
        row(f"u{n:04d}", path=f"/audio/x/{n}.wav", phones=[(0.0, 0.1 * n, "a")] if n % 3 else None)
        for n in range(3 * ROW_GROUP)
    ]
    write_manifest(tmp_path / "all", rows, {}, {}, root="/audio")
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(rows)) < 0.7)
    fingerprint = copy_manifest(
        tmp_path / "some",
        Manifest(tmp_path / "all").take(chosen[::-1]),
        {"seed": 1},
        {"manifest": "f00d"},
        budget="70%",
    )
    assert write_manifest(tmp_path / "alone", [rows[n] for n in chosen], {}, {}, root="/audio") == fingerprint
    meta = json.loads((tmp_path / "some" / "meta.json").read_text())
    assert (meta["root"], meta["budget"], meta["config"], meta["num_utterances"]) == (
        "/audio",
        "70%",
        {"seed": 1},
        len(chosen),
    )
    assert meta["hours"] == pytest.approx(len(chosen) / 3600)


def test_a_copy_of_a_manifest_from_before_there_were_word_times_has_the_column(tmp_path: Path) -> None:
    write_manifest(tmp_path / "new", [row("a"), row("b")], {}, {})
    table = pq.read_table(tmp_path / "new" / "manifest.parquet").drop_columns(["words"])
    (tmp_path / "old").mkdir()
    pq.write_table(table, tmp_path / "old" / "manifest.parquet")
    commit(tmp_path / "old", "manifest", {}, {}, ["manifest.parquet"])
    copy_manifest(tmp_path / "copy", Manifest(tmp_path / "old").take(np.array([1])), {}, {})
    words = [table for _, table in Manifest(tmp_path / "old").take(np.array([1])).blocks(["words"])]
    assert [table.to_pydict() for table in words] == [{"words": [None]}]
    assert list(Manifest(tmp_path / "copy")) == [Manifest(tmp_path / "new")[1]]


def test_rows_are_taken_from_columns_of_more_text_than_arrow_can_join() -> None:
    offsets, text = (
        pa.py_buffer(np.array([0, 3, 2**30 + 3], np.int32)),
        pa.py_buffer(np.zeros(2**30 + 3, np.uint8)),
    )
    # a short id and one of 1 GiB, of pages that nobody touches
    chunk = pa.StringArray.from_buffers(2, offsets, text)
    column = pa.chunked_array([chunk] * 3)
    with pytest.raises(pa.ArrowInvalid, match="offset overflow"):
        column.take(pa.array([0, 4]))  # if this passes one day, `take` is no longer needed
    assert take(column, np.array([0, 2, 4])).to_pylist() == ["\0\0\0"] * 3
    few = pa.chunked_array([["a", "b"], [], ["c"], ["d", "e"]])
    for rows in ([], [4], [0, 1, 2, 3, 4], [1, 3], [3, 1], [2, 2]):
        assert take(few, np.array(rows, np.int64)).to_pylist() == [few[row].as_py() for row in rows]
