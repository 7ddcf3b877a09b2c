import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config import parse_config
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import commit_labels
from pretrain.data.manifest import Manifest, write_manifest
from quantize.codebook import write_codebook
from units.corpus.corpus_writing import Document
from units.corpus.unit_corpus import UnitCorpus
from units.formats.description import Described
from units.formats.writing import write_units
from units.packing import pack
from units.packing_config import PackConfig

FRAMES = {"a": [3, 3, 0, 0, 0, 4], "b": [1], "c": [2, 2, 2, 0]}


def make(
    root: Path,
    frames: dict[str, list[int]],
    *,
    num_classes: int = 5,
    labelled: list[str] | None = None,
    extra_frames: int = 0,
    num_levels: int = 1,
) -> PackConfig:
    """A manifest and labels of some utterances; paths need not exist, `pack` reads no audio. Level l of frame
    t is label + l."""
    rows = []
    for name, labels in frames.items():
        num_samples = 400 + 320 * (len(labels) - 1 + extra_frames)
        split = "test" if name == "c" else "train"
        rows.append(
            {
                "id": name,
                "path": f"{name}.wav",
                "start": 0,
                "num_samples": num_samples,
                "sample_rate": 16000,
                "split": split,
            }
        )
    write_manifest(root / "manifest", rows, {}, {})
    labelled = labelled or list(frames)
    arrays = [np.array(frames[name]) for name in labelled]
    if num_levels > 1:
        arrays = [
            np.stack([(array + level) % num_classes for level in range(num_levels)], axis=1)
            for array in arrays
        ]
    write_shard(root / "labels", 0, labelled, arrays)
    commit_labels(root / "labels", 1, {}, {}, codebook="c0de", num_classes=num_classes, num_levels=num_levels)
    return PackConfig(manifest=str(root / "manifest"), labels=str(root / "labels"), out=str(root / "units"))


def with_keys(config: PackConfig, **keys: Any) -> PackConfig:
    return PackConfig.model_validate(config.model_dump(exclude_unset=True) | keys)


def test_pack_keeps_every_frame_split_and_fingerprint(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    summary = pack(config)
    corpus = UnitCorpus(config.out)
    assert corpus.ids == ["a", "b", "c"] and corpus.splits == ["train", "train", "test"]
    assert [corpus.frames(i).tolist() for i in range(3)] == list(FRAMES.values())
    assert corpus.units(0).tolist() == [3, 0, 4] and corpus.durations(0).tolist() == [2, 3, 1]
    assert corpus.documents("train").tolist() == [0, 1] and corpus.documents().tolist() == [0, 1, 2]
    assert (corpus.num_units, corpus.codebook, corpus.frame_rate_hz, corpus.timed) == (5, "c0de", 50.0, True)
    assert (
        summary["num_tokens"] == 6 and summary["num_frames"] == 11 and corpus.num_frames.tolist() == [6, 1, 4]
    )


def test_pack_without_deduplication_keeps_a_token_per_frame(tmp_path: Path) -> None:
    config = with_keys(make(tmp_path, FRAMES), deduplicate=False)
    pack(config)
    corpus = UnitCorpus(config.out)
    assert corpus.units(0).tolist() == FRAMES["a"] and corpus.durations(0).tolist() == [1] * 6
    assert not corpus.deduplicated


def test_packing_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    pack(config)
    pack(with_keys(config, out=str(tmp_path / "again")))
    assert UnitCorpus(config.out).fingerprint == UnitCorpus(tmp_path / "again").fingerprint


def test_utterances_without_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels: no labels for utterance 'b'"):
        pack(make(tmp_path, FRAMES, labelled=["a"]))


def test_labels_of_another_length_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"labels: 6 labels for utterance 'a', which has 7 frames in .*manifest \(3 of 3"
    ):
        pack(make(tmp_path, FRAMES, extra_frames=1))
    assert not (tmp_path / "units").exists()


def test_of_labels_with_several_levels_the_first_is_packed_and_that_is_said(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES, num_levels=3)
    summary = pack(config)
    assert summary["notes"] == [f"labels: {config.labels} has 3 levels; level 0 is packed"]
    first = UnitCorpus(config.out)
    assert [first.frames(i).tolist() for i in range(3)] == list(FRAMES.values())


@pytest.mark.parametrize("deduplicated", [True, False])
def test_all_levels_are_packed_when_asked_for(tmp_path: Path, deduplicated: bool) -> None:
    config = with_keys(make(tmp_path, FRAMES, num_levels=3), levels="all", deduplicate=deduplicated)
    assert "notes" not in pack(config)
    corpus = UnitCorpus(config.out)
    assert corpus.vocabulary.sizes == (5, 5, 5) and corpus.num_streams == 3
    assert corpus.frames(0)[:, 2].tolist() == [(label + 2) % 5 for label in FRAMES["a"]]
    with pytest.raises(ValueError, match="has 3 levels; levels = 4 cannot be packed"):
        pack(with_keys(config, levels=4, out=str(tmp_path / "four")))


def test_merges_are_learnt_from_the_training_split_and_lose_nothing(tmp_path: Path) -> None:
    frames = {
        **{f"d{i}": [0, 1, 1, 2, 0, 1, 2, 3] for i in range(4)},
        "c": [4, 3, 4, 3, 4, 3, 4, 3],
    }  # c is test
    config = with_keys(make(tmp_path, frames), bpe={"vocabulary_size": 7, "max_units": 3})
    pack(config)
    corpus = UnitCorpus(config.out)
    assert len(corpus.vocabulary.merges) == 2 and {
        corpus.vocabulary.names()[5],
        corpus.vocabulary.names()[6],
    } == {
        "<Un0><Un1>",
        "<Un0><Un1><Un2>",
    }
    assert [corpus.frames(i).tolist() for i in range(5)] == list(frames.values())
    assert corpus.tokens(0).tolist() == [6, 6, 3]
    with pytest.raises(ValueError, match="bpe: no documents in split 'dev' to learn merges from"):
        pack(with_keys(config, bpe={"vocabulary_size": 7, "split": "dev"}, out=str(tmp_path / "none")))


def test_a_source_gets_splits_drawn_by_id_or_those_of_a_manifest(tmp_path: Path) -> None:
    lines = "".join(f"utterance{i}|{' '.join(str((i + t) % 7) for t in range(5))}\n" for i in range(200))
    (tmp_path / "units.txt").write_text(lines)
    given = {"source": str(tmp_path / "units.txt"), "format": "gslm", "codebook": "theirs", "num_units": 7}
    pack(PackConfig(**given, out=str(tmp_path / "drawn")))
    drawn = UnitCorpus(tmp_path / "drawn")
    assert drawn.codebook == "theirs" and not drawn.timed and drawn.units(3).tolist() == [3, 4, 5, 6, 0]
    shares = {split: len(drawn.documents(split)) / 200 for split in ("dev", "test", "train")}
    assert 0.01 < shares["dev"] < 0.11 and 0.01 < shares["test"] < 0.11
    (tmp_path / "backwards.txt").write_text("".join(reversed(lines.splitlines(keepends=True))))
    pack(PackConfig(**{**given, "source": str(tmp_path / "backwards.txt")}, out=str(tmp_path / "backwards")))
    backwards = UnitCorpus(tmp_path / "backwards")
    assert dict(zip(drawn.ids, drawn.splits, strict=True)) == dict(
        zip(backwards.ids, backwards.splits, strict=True)
    )

    make(tmp_path, FRAMES)
    (tmp_path / "three.txt").write_text("c|1 2\na|0\n")
    pack(
        PackConfig(
            **{**given, "source": str(tmp_path / "three.txt")},
            manifest=str(tmp_path / "manifest"),
            out=str(tmp_path / "joined"),
        )
    )
    assert UnitCorpus(tmp_path / "joined").splits == ["test", "train"]
    (tmp_path / "three.txt").write_text("z|1 2\n")
    with pytest.raises(ValueError, match="document 'z' is no utterance of"):
        pack(
            PackConfig(
                **{**given, "source": str(tmp_path / "three.txt")},
                manifest=str(tmp_path / "manifest"),
                out=str(tmp_path / "no"),
            )
        )


def test_a_source_that_does_not_say_whose_units_it_has_must_be_told(tmp_path: Path) -> None:
    (tmp_path / "units.txt").write_text("a|1 2\n")
    given: dict[str, Any] = {
        "source": str(tmp_path / "units.txt"),
        "format": "gslm",
        "out": str(tmp_path / "units"),
    }
    with pytest.raises(ValueError, match="does not say its codebook; give it as codebook = "):
        pack(PackConfig(**given))
    with pytest.raises(ValueError, match="does not say its num_units"):
        pack(PackConfig(**given, codebook="theirs"))
    with pytest.raises(ValueError, match="document 'a' has the unit 2; the codebook theirs has 0 .. 1"):
        pack(PackConfig(**given, codebook="theirs", num_units=2))
    with pytest.raises(ValueError, match="deduplicate = false cannot be"):
        sidecar = {"format": "gslm", "codebook": "x", "num_units": 3, "deduplicated": True}
        (tmp_path / "units.txt.meta.json").write_text(json.dumps(sidecar))
        pack(PackConfig(**given, deduplicate=False))
    with pytest.raises(ValueError, match="codebook 'x' by its own account, 'theirs' in the config"):
        pack(PackConfig(**given, codebook="theirs"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either `labels`, with their `manifest`, or the `source`"),
        ({"labels": "l"}, "labels are packed with their `manifest`"),
        ({"labels": "l", "manifest": "m", "num_units": 3}, "num_units: of a `source`"),
        (
            {"source": "s", "dev_share": 0.5, "test_share": 0.5},
            "dev_share 0.5 and test_share 0.5 leave nothing to train on",
        ),
        ({"source": "s", "text": {"layout": "grid"}}, "`text` goes with `labels`"),
        (
            {"labels": "l", "manifest": "m", "text": {"layout": "grid"}, "bpe": {"vocabulary_size": 9}},
            "`bpe` and `text` do not go together",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(PackConfig, {"out": "o", **keys}, "x.toml")


def test_words_of_the_manifest_go_between_the_units_or_beside_them(tmp_path: Path) -> None:
    rows = [
        {
            "id": "a",
            "path": "a.wav",
            "start": 0,
            "num_samples": 400 + 320 * 19,
            "sample_rate": 16000,
            "split": "train",
            "words": [(0.05, 0.15, "Ten"), (0.2, 0.35, "cats")],
        }
    ]
    write_manifest(tmp_path / "manifest", rows, {}, {})
    frames = np.repeat([0, 1, 2, 3, 4], 4)
    write_shard(tmp_path / "labels", 0, ["a"], [frames])
    commit_labels(tmp_path / "labels", 1, {}, {}, codebook="c0de", num_classes=5)
    given: dict[str, Any] = {"manifest": str(tmp_path / "manifest"), "labels": str(tmp_path / "labels")}

    def packed(name: str, **text: Any) -> UnitCorpus:
        pack(PackConfig(**given, out=str(tmp_path / name), text=text))
        return UnitCorpus(tmp_path / name)

    grid = packed("grid", layout="grid")
    assert grid.vocabulary.sizes == (len(set("tencas")) + 2, 5) and not grid.deduplicated
    text, units = grid.tokens(0).T
    assert (
        "".join(grid.vocabulary.text[piece] for piece in text if piece != grid.vocabulary.grid_pad)
        == "▁ten▁cats"
    )
    assert units.tolist() == frames.tolist() and grid.frames(0)[:, 1].tolist() == frames.tolist()

    for seed in range(20):
        mixed = packed(f"mixed{seed}", layout="interleaved", seed=seed, span_words=1)
        assert mixed.durations(0).sum() == 20
        if len(set(mixed.vocabulary.is_text()[mixed.tokens(0)])) == 2:
            break
    else:
        raise AssertionError("twenty draws never mixed speech and text")
    with pytest.raises(ValueError, match="text has taken the place of some units"):
        mixed.frames(0)


def source(path: Path, text: str, **keys: Any) -> PackConfig:
    """A GSLM file of 7 units beside which the corpus goes."""
    path.write_text(text)
    return PackConfig(
        **{
            "source": str(path),
            "format": "gslm",
            "codebook": "theirs",
            "num_units": 7,
            "out": str(path.parent / "out"),
            **keys,
        }
    )


def test_a_killed_pack_does_not_go_on_with_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("units.corpus.corpus_writing.RECORD_SECONDS", 0.0)
    lines = [f"u{i}|1 2\n" for i in range(30)]
    with pytest.raises(ValueError, match="line 21"):
        pack(source(tmp_path / "st.txt", "".join([*lines[:20], "u|x\n", *lines[20:]])))
    assert pack(source(tmp_path / "st.txt", "".join(lines[5:])))["num_documents"] == 25
    assert UnitCorpus(tmp_path / "out").ids == [f"u{i}" for i in range(5, 30)]

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    config = source(tmp_path / "st.txt", "a|1 2\n", out=str(tmp_path / "killed"), deduplicate=True)
    with monkeypatch.context() as patched:
        patched.setattr("units.corpus.corpus_writing.commit", killed)
        with pytest.raises(Killed):
            pack(config)
    (tmp_path / "st.txt.durations").write_text("a|1 2\n")
    with pytest.raises(
        ValueError, match=r"partial: holds unfinished work on something else \(.*parents .*'source'"
    ):
        pack(config)
    (tmp_path / "st.txt.durations").unlink()
    pack(config)
    assert set(UnitCorpus(tmp_path / "killed").meta["parents"]) == {"source"}


def test_splits_of_a_source_do_not_contradict_the_manifest(tmp_path: Path) -> None:
    make(tmp_path, FRAMES)  # c is test
    given: dict[str, Any] = {"format": "parquet", "manifest": str(tmp_path / "manifest")}
    path = tmp_path / "x.parquet"

    def packed(ids: list[str], splits: list[str | None], out: str) -> UnitCorpus:
        config = source(path, "", **given, out=str(tmp_path / out))
        pq.write_table(
            pa.table({"id": ids, "split": pa.array(splits, pa.string()), "units": [[1, 2]] * len(ids)}), path
        )
        pack(config)
        return UnitCorpus(tmp_path / out)

    with pytest.raises(ValueError, match=r"x.parquet: document 'c' is train, but test in .*manifest"):
        packed(["a", "c"], ["train", "train"], "one")
    with pytest.raises(ValueError, match=r"document 'z' is no utterance of"):
        packed(["a", "z"], ["train", "train"], "two")
    corpus = packed(["a", "c"], ["train", None], "three")
    assert corpus.splits == ["train", "test"]
    assert corpus.meta["parents"]["manifest"] == Manifest(tmp_path / "manifest").fingerprint


def test_levels_left_out_and_a_frame_rate_assumed_are_said(tmp_path: Path) -> None:
    (tmp_path / "codes").mkdir()
    np.save(tmp_path / "codes/a.npy", np.arange(12).reshape(3, 4) % 7)
    given: dict[str, Any] = {"source": str(tmp_path / "codes"), "codebook": "encodec", "num_units": 7}
    assert pack(PackConfig(**given, out=str(tmp_path / "one")))["notes"] == [
        f"source: {tmp_path}/codes has 3 levels; level 0 is packed",
        f"source: {tmp_path}/codes does not say its frame rate; 50 Hz is assumed (frame_rate_hz = …)",
    ]
    assert "notes" not in pack(
        PackConfig(**given, levels="all", frame_rate_hz=75.0, out=str(tmp_path / "all"))
    )


def test_units_of_which_nobody_says_whether_they_are_frames_are_not_packed_as_frames(tmp_path: Path) -> None:
    config = source(tmp_path / "st.txt", "a|1 1 2\n", deduplicate=False)
    with pytest.raises(
        ValueError, match="does not say whether a unit is a frame; if so, say source_options.per_frame = true"
    ):
        pack(config)
    pack(with_keys(config, source_options={"per_frame": True}))
    corpus = UnitCorpus(config.out)
    assert corpus.frames(0).tolist() == [1, 1, 2] and not corpus.deduplicated


def test_a_codebook_that_is_a_path_must_be_one_and_says_its_k(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codebok: no such codebook"):
        pack(source(tmp_path / "st.txt", "a|1 2\n", codebook=str(tmp_path / "codebok")))
    with pytest.raises(ValueError, match=r"no meta.json, so not a complete codebook"):
        pack(source(tmp_path / "st.txt", "a|1 2\n", codebook=str(tmp_path)))
    folder = tmp_path / "codebook"
    fingerprint = write_codebook(folder, np.zeros((1, 3, 2)), np.zeros(2), {}, {}, {}, {})
    with pytest.raises(ValueError, match=r"st.txt: num_units 7 in the config, 3 by the codebook's"):
        pack(source(tmp_path / "st.txt", "a|1 2\n", codebook=str(folder)))
    pack(source(tmp_path / "st.txt", "a|1 2\n", codebook=str(folder), num_units=None))
    corpus = UnitCorpus(tmp_path / "out")
    assert (corpus.codebook, corpus.num_units) == (fingerprint, 3)


def test_a_sidecar_is_not_taken_for_that_of_another_file(tmp_path: Path) -> None:
    described = Described(codebook="mine", num_units=7, deduplicated=True)
    write_units(
        tmp_path / "st.txt",
        "gslm",
        [Document("a", None, np.array([1, 2])), Document("b", None, np.array([3]))],
        described,
    )
    given = {"source": str(tmp_path / "st.txt")}
    (tmp_path / "st.txt").write_text("b|3\nz|1 2\n")  # another order and other names: the same units
    pack(PackConfig(**given, out=str(tmp_path / "same")))
    (tmp_path / "st.txt").write_text("a|1 4\nb|3\n")
    with pytest.raises(
        ValueError,
        match="its units are not those that st.txt.meta.json describes; remove st.txt.meta.json and say",
    ):
        pack(PackConfig(**given, out=str(tmp_path / "other")))
    assert not (tmp_path / "other/meta.json").exists()


def test_interleaved_text_with_several_levels_is_refused_in_the_user_s_words(tmp_path: Path) -> None:
    config = with_keys(make(tmp_path, FRAMES, num_levels=2), levels="all", text={"layout": "interleaved"})
    with pytest.raises(
        ValueError,
        match=r"^text.layout = interleaved is for units of one level, and 2 are packed; levels = 1",
    ):
        pack(config)


def test_folders_of_wordless_are_no_source(tmp_path: Path) -> None:
    config = make(tmp_path, FRAMES)
    pack(config)
    given: dict[str, Any] = {"codebook": "x", "num_units": 5, "out": str(tmp_path / "no")}
    with pytest.raises(
        ValueError, match=r"labels is a 'labels' of wordless; give it as `labels`, with their `manifest`"
    ):
        pack(PackConfig(source=config.labels, format="codec", **given))
    with pytest.raises(ValueError, match=r"units is a 'units' of wordless; it is packed already"):
        pack(PackConfig(source=config.out, **given))
