from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import label_shards
from pretrain.data import labels as labels_module
from pretrain.data.label_shards import id_hashes, shard_fault, shard_stands, write_shard
from pretrain.data.labels import Labels, commit_labels, count_classes
from pretrain.data.utterance import num_frames


def label_arrays(lengths: list[int], levels: int | None = None, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, (length,) if levels is None else (length, levels)) for length in lengths]


def write(
    folder: Path, shards: list[list[str]], levels: int | None = None, **options: object
) -> dict[str, np.ndarray]:
    everything = {}
    for number, ids in enumerate(shards):
        arrays = label_arrays([3 + len(name) for name in ids], levels, seed=number)
        write_shard(folder, number, ids, arrays)
        everything |= dict(zip(ids, arrays, strict=True))
    settings = {"codebook": "c0de", "num_classes": 100, "num_levels": levels or 1, **options}
    commit_labels(folder, len(shards), {"k": 100}, {"codebook": "c0de"}, **settings)  # type: ignore[arg-type]
    return everything


@pytest.mark.parametrize("levels", [None, 3])
def test_what_was_written_is_read_by_id_in_any_order(tmp_path: Path, levels: int | None) -> None:
    written = write(tmp_path, [["b", "a/1"], ["ünï"], ["zz", "c", "d"]], levels)
    labels = Labels(tmp_path)
    assert labels.ids == ["b", "a/1", "ünï", "zz", "c", "d"] and len(labels) == 6
    assert (labels.codebook, labels.num_classes, labels.num_levels, labels.frame_rate_hz) == (
        "c0de",
        100,
        levels or 1,
        50.0,
    )
    for name in reversed(labels.ids):
        assert labels[name].dtype == np.uint16
        np.testing.assert_array_equal(labels[name], written[name])
        assert labels.num_frames(name) == len(written[name])
    assert "a/1" in labels and "a/2" not in labels


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_utterances_of_any_length_come_back(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    arrays = label_arrays([*lengths, 1])
    write_shard(folder, 0, [str(i) for i in range(len(arrays))], arrays)
    commit_labels(folder, 1, {}, {}, codebook="c", num_classes=100)
    labels = Labels(folder)
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(labels[str(number)], array)


def test_an_utterance_without_labels_is_named(tmp_path: Path) -> None:
    write(tmp_path, [["a"]])
    for read in (Labels(tmp_path).__getitem__, Labels(tmp_path).num_frames):
        with pytest.raises(ValueError, match="no labels for utterance 'b'"):
            read("b")


def test_a_shard_stands_only_with_its_table(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ["a"], label_arrays([3]))
    assert shard_stands(tmp_path, 0) and not shard_stands(tmp_path, 1)
    (tmp_path / "shard_00000.parquet").unlink()
    assert not shard_stands(tmp_path, 0)


def test_a_missing_shard_is_refused_at_commit_and_named_when_lost_later(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ["a"], label_arrays([3]))
    with pytest.raises(ValueError, match="shard 1 of 2 is missing"):
        commit_labels(tmp_path, 2, {}, {}, codebook="c", num_classes=100)
    with pytest.raises(ValueError, match=r"no meta\.json"):
        Labels(tmp_path)
    commit_labels(tmp_path, 1, {}, {}, codebook="c", num_classes=100)
    (tmp_path / "shard_00000.npy").unlink()
    with pytest.raises(ValueError, match="shard_00000"):
        Labels(tmp_path)


@pytest.mark.parametrize(
    ("shards", "expected", "fault"),
    [
        (
            [["a", "b"], ["a"]],
            ["a", "b"],
            r"2 distinct of 3 utterances, not exactly what was asked: 'a' more than once;",
        ),
        ([["a", "b"], ["a", "b"]], None, r"'.' and 1 more more than once;"),
        ([["a"]], ["a", "b"], r"not exactly what was asked: 'b' missing;"),
        ([["a"], ["b"]], ["a"], r"not exactly what was asked: 'b' not asked for;"),
        ([["a"], ["c", "a"]], ["a", "b"], r": 'a' more than once; 'b' missing; 'c' not asked for;"),
    ],
)
def test_every_expected_utterance_is_there_exactly_once(
    tmp_path: Path, shards: list[list[str]], expected: list[str] | None, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        write(tmp_path, shards, expected_ids=expected)
    assert not (tmp_path / "meta.json").exists()


def test_every_expected_utterance_has_its_frames(tmp_path: Path) -> None:
    for shard, ids in enumerate([["bb", "a"], ["cccc"]]):
        write_shard(tmp_path, shard, ids, label_arrays([len(name) for name in ids]))
    options: dict[str, Any] = {"codebook": "c", "num_classes": 100, "expected_ids": ["a", "cccc", "bb"]}
    with pytest.raises(
        ValueError, match=r"4 labels for utterance 'cccc', which has 5 frames \(1 of 3 utterances differ\)"
    ):
        commit_labels(tmp_path, 2, {}, {}, **options, expected_frames=np.array([1, 5, 2]))
    first = commit_labels(tmp_path, 2, {}, {}, **options, expected_frames=np.array([1, 4, 2]))
    assert commit_labels(tmp_path, 2, {}, {}, **options, expected_frames=np.array([1, 4, 2])) == first


def test_what_is_wrong_with_a_standing_shard_is_told(tmp_path: Path) -> None:
    ids, frames = ["a", "bb"], np.array([1, 2])
    write_shard(tmp_path, 0, ids, label_arrays([1, 2]))
    assert shard_fault(tmp_path, 0, ids, frames) is None is shard_fault(tmp_path, 0, id_hashes(ids), frames)
    assert "names other utterances" in str(shard_fault(tmp_path, 0, ["bb", "a"], frames))
    assert "other numbers of frames" in str(shard_fault(tmp_path, 0, ids, frames[::-1]))
    assert "1 levels, not 2" in str(shard_fault(tmp_path, 0, ids, frames, num_levels=2))
    np.save(tmp_path / "shard_00000.npy", np.zeros(3, np.int64))
    assert "not a shard of labels" in str(shard_fault(tmp_path, 0, ids, frames))
    (tmp_path / "shard_00000.npy").write_bytes(b"")
    assert "missing or damaged" in str(shard_fault(tmp_path, 0, ids, frames))
    assert "missing or damaged" in str(shard_fault(tmp_path, 1, ids, frames))


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("rate", [50.0, 100.0])
def test_classes_are_counted_as_one_by_one(tmp_path: Path, levels: int | None, rate: float) -> None:
    written = write(tmp_path, [["a", "four"], ["cc", "five5"]], levels, frame_rate_hz=rate)
    expected = np.zeros((levels or 1, 100), np.int64)
    for array in written.values():
        for frame in array.reshape(len(array), -1)[:: int(rate) // 50]:
            for level, label in enumerate(frame):
                expected[level, label] += 1
    np.testing.assert_array_equal(count_classes(tmp_path), expected)


def test_an_array_that_does_not_match_its_table_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [["a", "b"]])
    np.save(tmp_path / "shard_00000.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match=r"shard_00000\.npy: 3 frames where the index has 8"):
        Labels(tmp_path)
    (tmp_path / "shard_00000.npy").write_bytes((tmp_path / "shard_00000.npy").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"shard_00000\.npy.* damaged"):
        Labels(tmp_path)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    for wrong in (
        np.array([0, -1]),
        np.array([0, 65536]),
    ):  # k-means gives -1 for NaN, which would read as 65535
        with pytest.raises(AssertionError):
            write_shard(tmp_path, 0, ["a"], [wrong])
    write_shard(tmp_path, 0, ["a"], [np.array([0, 100])])
    with pytest.raises(ValueError, match="label 100 of shard 0 is beyond the codebook's 100 classes"):
        commit_labels(tmp_path, 1, {}, {}, codebook="c", num_classes=100)


def test_the_declared_levels_are_the_arrays_levels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 0 has 3 levels, not 2"):
        write(tmp_path, [["a"]], levels=3, num_levels=2)


# Many at once, and other frame rates


@settings(max_examples=30)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=30, unique=True), st.integers(1, 4), st.data())
def test_many_utterances_are_found_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], num_shards: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    written = write(folder, [names[i::num_shards] for i in range(num_shards) if names[i::num_shards]])
    labels = Labels(folder)
    asked = data.draw(st.lists(st.sampled_from(names), max_size=40))
    expected = [len(written[name]) for name in asked]
    assert labels.frame_counts(asked).tolist() == expected
    pieces = [pa.array(asked[:5], pa.string()), pa.array(asked[5:], pa.string())]
    assert labels.frame_counts(pa.chunked_array(pieces)).tolist() == expected
    with pytest.raises(ValueError, match="no labels for utterance 'longer'"):
        labels.frame_counts([*asked, "longer", *asked])


def test_ids_whose_hashes_agree_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard, ids in enumerate([["a", "b"], ["c", "d", "e"]]):
        write_shard(tmp_path, shard, ids, label_arrays([ord(name) for name in ids]))
    commit_labels(tmp_path, 2, {}, {}, codebook="c", num_classes=100)
    for module in (label_shards, labels_module):
        monkeypatch.setattr(module, "id_hash", lambda name: 7)
    labels = Labels(tmp_path)
    assert labels.frame_counts(list("edabcab")).tolist() == [ord(name) for name in "edabcab"]
    assert len(labels["d"]) == ord("d") and "f" not in labels
    with pytest.raises(ValueError, match="no labels for utterance 'f'"):
        labels.frame_counts(["a", "f", "b"])


@pytest.mark.parametrize("levels", [None, 2])
def test_labels_at_100_hz_are_read_as_every_second_one(tmp_path: Path, levels: int | None) -> None:
    written = write(tmp_path, [["a", "four"], ["cc"]], levels, frame_rate_hz=100.0)
    labels = Labels(tmp_path)
    assert labels.frame_rate_hz == 50.0 and labels.meta["frame_rate_hz"] == 100.0
    for name, array in written.items():
        np.testing.assert_array_equal(labels[name], array[::2])
        assert labels.num_frames(name) == labels.frame_counts([name])[0] == len(array[::2])


@given(st.integers(400, 100_000))
def test_every_second_kaldi_frame_is_a_frame_of_the_encoder(num_samples: int) -> None:
    starts_of_10_ms = np.arange(0, num_samples - 400 + 1, 160)  # snip_edges: the windows of 25 ms that fit
    np.testing.assert_array_equal(starts_of_10_ms[::2], np.arange(num_frames(num_samples)) * 320)


def test_labels_of_another_rate_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [["a"]], frame_rate_hz=25.0)
    with pytest.raises(
        ValueError, match=r"labels at 25.0 Hz cannot be used; the encoder has 50 frames a second"
    ):
        Labels(tmp_path)


def test_one_label_more_or_less_is_rounding_and_two_are_fatal(tmp_path: Path) -> None:
    counts = write(tmp_path, [["a", "bb"], ["ccc"]])  # 4, 5 and 6 labels
    labels = Labels(tmp_path)
    for difference in (-1, 0, 1):
        labels.require_frames(list(counts), np.array([4, 5 + difference, 6]))
    for difference in (-2, 2):
        message = (
            rf"5 labels for utterance 'bb', which has {5 + difference} frames of 20 ms \(1 of 3 utterances "
            r"differ"
        )
        with pytest.raises(ValueError, match=message):
            labels.require_frames(list(counts), np.array([4, 5 + difference, 6]))


def test_a_wrong_frame_rate_is_guessed_at(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ["a", "b"], label_arrays([200, 301]))
    for rate, frames, hint in (
        (50.0, [100, 151], "look like 100 Hz labels: declare frame_rate_hz = 100"),
        (100.0, [200, 301], "look like 50"),
    ):
        commit_labels(tmp_path, 1, {}, {}, codebook="c", num_classes=100, frame_rate_hz=rate)
        with pytest.raises(ValueError, match=hint):
            Labels(tmp_path).require_frames(["a", "b"], np.array(frames))
