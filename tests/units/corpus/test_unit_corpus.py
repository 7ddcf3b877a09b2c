import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import units.corpus.corpus_writing as corpus_module
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.patterns import Pattern
from units.corpus.sequence import deduplicate
from units.corpus.sequences import ListedSequences, Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary


def write(
    folder: Path, documents: list[Document] | object, num_units: int = 5, **options: object
) -> UnitCorpus:
    given: dict[str, object] = {"codebook": "c0de", "frame_rate_hz": 50.0, "deduplicated": True, **options}
    given.setdefault("vocabulary", Vocabulary(num_units=num_units))
    write_corpus(folder, documents, {}, {}, **given)  # type: ignore[arg-type]
    return UnitCorpus(folder)


def of_frames(name: str, frames: list[int] | np.ndarray, split: str | None = None) -> Document:
    return Document(name, split, *deduplicate(np.array(frames, np.uint16)))


@settings(max_examples=30, deadline=None)  # it writes files
@given(
    st.lists(hnp.arrays(np.uint16, st.integers(1, 30), elements=st.integers(0, 4)), min_size=1, max_size=5)
)
def test_any_documents_come_back_as_they_were_packed(
    tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]
) -> None:
    corpus = write(
        tmp_path_factory.mktemp("corpus"), [of_frames(str(i), frames) for i, frames in enumerate(documents)]
    )
    sequences = Sequences(corpus, corpus.documents(), Pattern("flatten", [5]))
    for i, frames in enumerate(documents):
        assert np.array_equal(corpus.frames(i), frames)
        whole = sequences[i]
        assert whole.tolist() == [5, *corpus.units(i).tolist(), 6] and sequences.lengths[i] == len(whole) - 1
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                assert np.array_equal(sequences.read(i, start, stop), whole[start:stop])


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 30), st.just(3)), elements=st.integers(0, 2)))
def test_several_levels_come_back_and_are_merged_only_where_all_of_them_repeat(
    tmp_path_factory: pytest.TempPathFactory, frames: np.ndarray
) -> None:
    vocabulary = Vocabulary(num_units=3, num_levels=3)
    corpus = write(
        tmp_path_factory.mktemp("corpus"), [Document("a", None, *deduplicate(frames))], vocabulary=vocabulary
    )
    assert np.array_equal(corpus.frames(0), frames) and corpus.num_streams == 3
    units = corpus.units(0)
    assert (units[1:] != units[:-1]).any(1).all()
    for name in ("parallel", "delay", "flatten", "coarse-first"):
        pattern = Pattern(name, vocabulary.sizes)
        sequences = Sequences(corpus, corpus.documents(), pattern)
        assert np.array_equal(pattern.restore(sequences[0]), units)
        assert np.array_equal(sequences.read(0, 1, 3), sequences[0][1:3])


def test_with_merges_tokens_are_fewer_and_units_durations_and_frames_the_same(tmp_path: Path) -> None:
    frames = {"a": [0, 0, 1, 0, 1, 1], "b": [2, 2], "c": [1, 0, 1, 2]}
    documents = [of_frames(name, labels) for name, labels in frames.items()]
    merged = write(tmp_path, documents, vocabulary=Vocabulary(num_units=3, merges=((0, 1), (3, 3))))
    assert [merged.tokens(i).tolist() for i in range(3)] == [[4], [2], [1, 3, 2]]
    assert [merged.units(i).tolist() for i in range(3)] == [[0, 1, 0, 1], [2], [1, 0, 1, 2]]
    assert [merged.frames(i).tolist() for i in range(3)] == list(frames.values())
    assert merged.lengths.tolist() == [1, 1, 3] and merged.num_units_of.tolist() == [4, 1, 4]
    # packed again without merges, the file of the merged units is left over
    (tmp_path / "meta.json").unlink()
    assert write(tmp_path, documents[1:], num_units=3).num_units_of.tolist() == [1, 4]


def test_a_large_codebook_gets_32_bit_tokens(tmp_path: Path) -> None:
    corpus = write(tmp_path, [of_frames("a", [65535, 0])], num_units=65536)
    assert corpus.units(0).dtype == np.uint32
    assert Sequences(corpus, corpus.documents(), Pattern("flatten", [65536]))[0].tolist() == [
        65536,
        65535,
        0,
        65537,
    ]


def test_units_whose_durations_nobody_knows_have_no_frames(tmp_path: Path) -> None:
    corpus = write(tmp_path, [Document("a", None, np.array([1, 2]))], timed=False)
    assert corpus.units(0).tolist() == [1, 2] and corpus.num_frames.tolist() == [0] and not corpus.timed
    for read in (corpus.durations, corpus.frames):
        with pytest.raises(ValueError, match="has no durations of units"):
            read(0)


class Killed(BaseException):
    """What no handler catches, as a signal would be."""


def test_a_killed_pack_goes_on_where_its_files_were_safe_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    documents = [of_frames(f"d{i}", rng.integers(0, 5, rng.integers(1, 50)), "train") for i in range(60)]
    vocabulary = Vocabulary(num_units=5, merges=((0, 1), (5, 2)))
    whole = write(tmp_path / "whole", documents, vocabulary=vocabulary)
    asked: list[int] = []

    def killed_after(count: int) -> object:
        def stream(first: int) -> Iterator[Document]:
            asked.append(first)
            for number, document in enumerate(documents[first:]):
                if number == count:
                    raise Killed
                yield document

        return stream

    monkeypatch.setattr(corpus_module, "RECORD_SECONDS", 0.0)
    for count in (7, 20):
        with pytest.raises(Killed):
            write(tmp_path / "killed", killed_after(count), vocabulary=vocabulary)
    with open(tmp_path / "killed" / "partial" / "tokens.npy", "ab") as file:
        file.write(b"what was not yet recorded")
    resumed = write(tmp_path / "killed", killed_after(1000), vocabulary=vocabulary)
    assert asked == [0, 7, 27] and resumed.fingerprint == whole.fingerprint
    assert not (tmp_path / "killed" / "partial").exists()


def test_a_pack_killed_while_commit_hashes_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [of_frames(f"d{i}", [i % 5, 1, 0, 1]) for i in range(9)]
    vocabulary = Vocabulary(num_units=5, merges=((1, 0),))
    whole = write(tmp_path / "whole", documents, vocabulary=vocabulary)
    for seconds in (0.0, 1000.0):  # with and without a record of how far the arrays reach
        folder = tmp_path / f"killed{seconds}"
        with monkeypatch.context() as patched:
            patched.setattr(corpus_module, "RECORD_SECONDS", seconds)
            patched.setattr(corpus_module, "commit", lambda *_, **__: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                write(folder, documents, vocabulary=vocabulary)
        assert (folder / "tokens.npy").is_file() and (folder / "partial/written.json").is_file() == (
            not seconds
        )
        assert write(folder, documents, vocabulary=vocabulary).fingerprint == whole.fingerprint


def test_an_unfinished_corpus_with_a_mistake_in_it_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "RECORD_SECONDS", 0.0)
    with pytest.raises(ValueError, match="row 1: a second document with the id 'a'"):
        write(tmp_path, [of_frames("a", [1]), of_frames("a", [2])])
    assert write(tmp_path, [of_frames("a", [1]), of_frames("b", [2])]).ids == ["a", "b"]


def test_unfinished_work_on_something_else_is_not_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(first: int) -> Iterator[Document]:
        yield of_frames("a", [1, 2])
        raise Killed

    monkeypatch.setattr(corpus_module, "RECORD_SECONDS", 0.0)
    with pytest.raises(Killed):
        write(tmp_path, stream)
    with pytest.raises(
        ValueError,
        match=r"partial: holds unfinished work on something else \(codebook 'c0de' there, '0ther' now\)",
    ):
        write(tmp_path, [of_frames("a", [1, 2])], codebook="0ther")


def test_units_outside_the_codebook_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document 'a' has the unit 4; the codebook c0de has 0 .. 3"):
        write(tmp_path, [of_frames("a", [0, 4])], num_units=4)
    with pytest.raises(
        ValueError, match=r"document 'a' has the unit 3 in stream 1; the codebook c0de has 0 .. 2"
    ):
        levels = Document("a", None, np.array([[0, 3]]), np.ones(1, np.uint16))
        write(tmp_path / "levels", [levels], vocabulary=Vocabulary(num_units=3, num_levels=2))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([("a", [1]), ("b", [])], "row 1, document 'b', is empty"),
        ([("a", [1]), ("a", [2])], "row 1: a second document with the id 'a'"),
        ([], "no documents to pack"),
    ],
)
def test_bad_documents_are_named(
    tmp_path: Path, documents: list[tuple[str, list[int]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [of_frames(name, frames) for name, frames in documents])
    assert not (tmp_path / "meta.json").exists() and not (tmp_path / "partial").exists()


def test_durations_that_do_not_fit_their_units_are_named(tmp_path: Path) -> None:
    for durations, message in (
        (None, "2 units, but none durations"),
        ([1], "2 units, but 1 durations"),
        ([1, 65536], "outside 0 .. 65535"),
    ):
        document = Document("a", None, np.array([1, 2]), None if durations is None else np.array(durations))
        with pytest.raises(ValueError, match=message):
            write(tmp_path, [document])


def test_an_unknown_split_or_document_is_named_with_what_there_is(tmp_path: Path) -> None:
    corpus = write(tmp_path, [of_frames("a", [1], "train"), of_frames("b", [1], "test"), of_frames("c", [1])])
    with pytest.raises(ValueError, match=r"no documents in split 'dev'; its splits: test, train"):
        corpus.documents("dev")
    with pytest.raises(ValueError, match="no document 'z'"):
        corpus.index("z")
    assert corpus.documents("test").tolist() == [1] and corpus.index("c") == 2
    assert corpus.has_split("train") and corpus.has_split(None) and not corpus.has_split("dev")


def test_a_corpus_of_an_older_format_or_of_mixed_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [of_frames("a", [1, 2, 3])])
    write(tmp_path / "b", [of_frames("a", [1, 2])])
    shutil.copy(tmp_path / "b" / "tokens.npy", tmp_path / "a" / "tokens.npy")
    with pytest.raises(ValueError, match="its arrays differ in length"):
        UnitCorpus(tmp_path / "a")
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    del meta["vocabulary"]
    (tmp_path / "b" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="packed by an older wordless; pack its labels again"):
        UnitCorpus(tmp_path / "b")


def test_listed_sequences_are_read_like_those_of_a_corpus() -> None:
    listed = ListedSequences([np.array([5, 1, 6]), np.array([5, 1, 2, 6])])
    assert listed.lengths.tolist() == [2, 3] and listed.read(1, 1, 3).tolist() == [1, 2]


def test_packing_takes_as_much_memory_for_eight_times_the_corpus() -> None:
    """A process each, as a peak is never unlearnt. 8 bytes a document are allowed to stay, for finding
    repeated ids."""
    program = """if True:
        import sys, tempfile
        import numpy as np
        from units.corpus.corpus_writing import Document, write_corpus
        from units.corpus.vocabulary import Vocabulary
        units, durations = np.arange(300, dtype=np.uint16) % 100, np.ones(300, np.uint16)
        stream = (Document(f"utterance-{i}", "train", units, durations) for i in range(int(sys.argv[1])))
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(folder + "/u", stream, {}, {}, vocabulary=Vocabulary(num_units=100), codebook="c", frame_rate_hz=50.0, deduplicated=True)
        print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", program, count], capture_output=True, check=True, text=True
            ).stdout
        )
        for count in ("10000", "80000")
    )
    assert many - few < 16_000  # kB; 70,000 more documents of 300 units are 84 MB on the disk
