from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pretrain.labels import commit_labels, write_shard
from pretrain.manifest import write_manifest
from units.corpus import Document, PackConfig, Sequences, UnitCorpus, pack, write_corpus

FRAMES = {"a": [3, 3, 0, 0, 0, 4], "b": [1], "c": [2, 2, 2, 0]}


def make(
    root: Path, frames: dict[str, list[int]], *, num_classes: int = 5, labelled: list[str] | None = None, extra_frames: int = 0
) -> PackConfig:
    """A manifest and labels of three utterances; paths need not exist, `pack` reads no audio."""
    rows = []
    for name, labels in frames.items():
        num_samples = 400 + 320 * (len(labels) - 1 + extra_frames)
        split = "test" if name == "c" else "train"
        rows.append(
            {"id": name, "path": f"{name}.wav", "start": 0, "num_samples": num_samples, "sample_rate": 16000, "split": split}
        )
    write_manifest(root / "manifest", rows, {}, {})
    labelled = labelled or list(frames)
    write_shard(root / "labels", 0, labelled, [np.array(frames[name]) for name in labelled])
    commit_labels(root / "labels", 1, {}, {}, codebook="c0de", num_classes=num_classes)
    return PackConfig(manifest=str(root / "manifest"), labels=str(root / "labels"), out=str(root / "units"))


def test_pack_keeps_every_frame_split_and_fingerprint(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    summary = pack(config)
    corpus = UnitCorpus(config.out)
    assert corpus.ids == ["a", "b", "c"] and corpus.splits == ["train", "train", "test"]
    assert [corpus.frames(i).tolist() for i in range(3)] == list(FRAMES.values())
    assert corpus.units(0).tolist() == [3, 0, 4] and corpus.durations(0).tolist() == [2, 3, 1]
    assert corpus.documents("train").tolist() == [0, 1] and corpus.documents().tolist() == [0, 1, 2]
    assert (corpus.num_units, corpus.codebook, corpus.frame_rate_hz, corpus.bos, corpus.eos) == (5, "c0de", 50.0, 5, 6)
    assert corpus.sequence(2).tolist() == [5, 2, 0, 6]
    assert summary["num_tokens"] == 6 and summary["num_frames"] == 11 and corpus.num_frames.tolist() == [6, 1, 4]
    assert [s.tolist() for s in Sequences(corpus, corpus.documents("train"))] == [[5, 3, 0, 4, 6], [5, 1, 6]]


def test_pack_without_deduplication_keeps_a_token_per_frame(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES).model_copy(update={"deduplicate": False})
    pack(config)
    corpus = UnitCorpus(config.out)
    assert corpus.units(0).tolist() == FRAMES["a"] and corpus.durations(0).tolist() == [1] * 6
    assert not corpus.deduplicated


def test_packing_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    pack(config)
    pack(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert UnitCorpus(config.out).fingerprint == UnitCorpus(tmp_path / "again").fingerprint


@settings(max_examples=30, deadline=None)  # it writes files
@given(st.lists(hnp.arrays(np.uint16, st.integers(1, 30), elements=st.integers(0, 4)), min_size=1, max_size=5))
def test_any_documents_come_back_as_they_were_packed(tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    stream = (Document(str(i), None, frames) for i, frames in enumerate(documents))
    write_corpus(folder, stream, {}, {}, num_units=5, codebook="c0de", frame_rate_hz=50.0, deduplicated=True)
    corpus = UnitCorpus(folder)
    for i, frames in enumerate(documents):
        assert np.array_equal(corpus.frames(i), frames)
        whole = corpus.sequence(i)
        assert all(
            np.array_equal(corpus.sequence(i, a, b), whole[a:b]) for a in range(len(whole)) for b in range(a + 1, len(whole) + 1)
        )


def test_a_large_codebook_gets_32_bit_tokens(tmp_path: Path) -> None:
    frames = np.array([65535, 0], np.uint16)
    write_corpus(
        tmp_path, [Document("a", None, frames)], {}, {}, num_units=65536, codebook="c0de", frame_rate_hz=50.0, deduplicated=True
    )
    assert UnitCorpus(tmp_path).units(0).dtype == np.uint32
    assert UnitCorpus(tmp_path).sequence(0).tolist() == [65536, 65535, 0, 65537]


def test_utterances_without_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no labels for 2 of the 3 utterances of .*manifest, first 'b'"):
        pack(make(tmp_path, FRAMES, labelled=["a"]))


def test_labels_of_another_length_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels: 6 labels for utterance 'a', which has 7 frames in .*manifest"):
        pack(make(tmp_path, FRAMES, extra_frames=1))
    assert not any((tmp_path / "units").iterdir())


def test_units_outside_the_codebook_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document 'a' has the unit 4; the codebook c0de has 0 .. 3"):
        frames = np.array([0, 4], np.uint16)  # labels cannot be committed so; another tool's may be
        write_corpus(
            tmp_path, [Document("a", None, frames)], {}, {}, num_units=4, codebook="c0de", frame_rate_hz=50.0, deduplicated=True
        )


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([("a", [1]), ("b", [])], "row 1, document 'b', is empty"),
        ([("a", [1]), ("a", [2])], "row 1: a second document with the id 'a'"),
        ([], "no documents to pack"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, documents: list[tuple[str, list[int]]], message: str) -> None:
    stream = [Document(name, None, np.array(frames, np.uint16)) for name, frames in documents]
    with pytest.raises(ValueError, match=message):
        write_corpus(tmp_path, stream, {}, {}, num_units=5, codebook="c0de", frame_rate_hz=50.0, deduplicated=True)
    assert not (tmp_path / "meta.json").exists()


def test_of_labels_with_several_levels_level_0_is_packed_and_that_is_said(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    plain = pack(config)
    levels = [np.stack([labels, np.arange(len(labels)) % 5], axis=1) for labels in FRAMES.values()]
    write_shard(tmp_path / "levels", 0, list(FRAMES), levels)
    commit_labels(tmp_path / "levels", 1, {}, {}, codebook="c0de", num_classes=5, num_levels=2)
    summary = pack(config.model_copy(update={"labels": str(tmp_path / "levels"), "out": str(tmp_path / "first")}))
    assert summary == {**plain, "notes": [f"labels: {tmp_path}/levels has 2 levels; level 0 is packed, the plain codebook's units"]}
    assert UnitCorpus(tmp_path / "first").fingerprint == UnitCorpus(config.out).fingerprint


def test_an_unknown_split_or_document_is_named_with_what_there_is(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    pack(config)
    corpus = UnitCorpus(config.out)
    with pytest.raises(ValueError, match=r"no documents in split 'dev'; its splits: test, train"):
        corpus.documents("dev")
    with pytest.raises(ValueError, match="no document 'z'"):
        corpus.index("z")
