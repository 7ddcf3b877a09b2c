"""Files that are not as they were written.

Broken: every file of a checkpoint, of labels (finished ones, and the shards of unfinished work) and of a unit
corpus, by cutting it short, flipping a bit, emptying it, taking it away. Must hold: of a checkpoint the one
before is used and that is said; a shard of unfinished work is made again; finished labels and corpora are
refused by the file's name before anything of it is read wrongly. A flip may only go unnoticed where it
changes nothing that is read.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.data.label_shards import shard_fault, write_shard
from pretrain.data.labels import Labels, commit_labels, count_classes
from pretrain.store import arrays, hashes
from pretrain.store.arrays import CheckedNpy
from pretrain.store.hashes import sha256_blocks
from pretrain.training.checkpoint import (
    checkpoint_damage,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from units.corpus.bpe import learn
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.sequence import deduplicate
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from wordless.cli import main


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


def flip_somewhere(path: Path) -> None:
    rng = random.Random(path.name)
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "flipped": flip_somewhere,
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, -1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def damaged_copies(folder: Path, into: Path, files: str = "*") -> Iterator[tuple[str, Path, Path]]:
    """(what was done, the copy, the file it was done to) for every file and every damage."""
    for path in sorted(folder.rglob(files)):
        for name, damage in DAMAGE.items():
            copy = into / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            damage(copy / path.relative_to(folder))
            if not (path.name == "meta.json" and name == "one byte short"):  # its last line's end
                yield f"{path.name}: {name}", copy, copy / path.relative_to(folder)


# Checkpoints


def trained(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    adamw.step()
    return model, adamw


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        state = {
            "epoch": 0,
            "batch": step,
            "seconds": 1.25,
            "kind": "test",
            "extra": {"ü": "ß"},
            "config": {"lr": 0.1, "to": [1, 2]},
        }
        save_checkpoint(tmp_path / "run", step, *trained(step), state)
    return tmp_path / "run"


def test_any_damage_to_any_file_of_a_checkpoint_makes_the_one_before_it_the_newest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, copy, path in damaged_copies(run / "step_00000002", tmp_path):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "step_00000001", folder / "step_00000001")
        shutil.copytree(copy, folder / "step_00000002")
        assert latest_checkpoint(folder) == folder / "step_00000001", what
        said = capsys.readouterr().err
        assert "step_00000002: damaged (" in said and said.count("\n") == 1, what
        assert path.name != "model.safetensors" or "model.safetensors" in said
        weights, _, _ = load_weights(folder)
        assert torch.equal(weights["weight"], trained(1)[0].state_dict()["weight"])
        capsys.readouterr()


def test_a_flip_of_any_byte_of_a_checkpoints_state_is_noticed_or_changes_nothing(run: Path) -> None:
    folder = run / "step_00000002"
    sound, path = json.loads((folder / "state.json").read_text()), folder / "state.json"
    harmless, rng = 0, random.Random(0)
    for place in range(path.stat().st_size):
        bit = rng.randrange(8)
        flip(path, place, bit)
        if not checkpoint_damage(folder):
            assert json.loads(path.read_text()) == sound, (place, bit)
            assert load_checkpoint(folder, *trained(0)) == sound
            harmless += 1
        flip(path, place, bit)
    assert harmless < path.stat().st_size / 20  # white space that stays white space
    assert not checkpoint_damage(folder)


def test_a_checkpoint_of_a_version_without_a_hash_of_the_state_is_valid(run: Path) -> None:
    path = run / "step_00000002" / "state.json"
    state = json.loads(path.read_text())
    assert state["sha256"].pop("state.json")
    path.write_text(json.dumps(state))
    assert checkpoint_damage(path.parent) == ""
    del state["sha256"]["optimizer.safetensors"]  # as a hash that was flipped away would leave it
    path.write_text(json.dumps(state))
    assert "optimizer.safetensors" in checkpoint_damage(path.parent)


# Labels

IDS, LENGTHS = [["a", "bb", "ü"], ["dd", "e"]], [[3, 4, 5], [0, 7]]


def write_labels(folder: Path, *, finish: bool = True) -> None:
    for shard, (ids, lengths) in enumerate(zip(IDS, LENGTHS, strict=True)):
        write_shard(folder, shard, ids, [np.arange(length) % 7 for length in lengths])
    if finish:
        commit_labels(folder, 2, {"k": 7}, {"codebook": "c0de"}, codebook="c0de", num_classes=7)


def read_all(folder: Path) -> list[list[int]]:
    labels = Labels(folder)
    return [labels[name].tolist() for name in labels.ids]


def test_any_damage_to_any_file_of_labels_is_told_by_its_name_and_nothing_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_labels(tmp_path / "labels")
    assert read_all(tmp_path / "labels") == [list(range(length)) for length in (3, 4, 5, 0, 7)]
    for what, copy, path in damaged_copies(tmp_path / "labels", tmp_path):
        named = path.stem if path.suffix in (".npy", ".parquet") else str(copy)
        for read in (read_all, count_classes):
            with pytest.raises(ValueError) as told:
                read(copy)
            assert named in str(told.value), what
        if path.name != "meta.json" or what.endswith("gone"):
            assert main(["check", str(copy)]) == 2, what
            capsys.readouterr()


def test_what_is_sound_of_damaged_labels_can_be_read(tmp_path: Path) -> None:
    write_labels(tmp_path)
    flip(tmp_path / "shard_00001.npy", -2)
    labels = Labels(tmp_path)
    assert labels["bb"].tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ValueError,
        match=r"shard_00001\.npy: damaged: not the bytes that were written \(SHA-256\); restore the file",
    ):
        labels["e"]


def test_a_flip_of_any_byte_of_an_unfinished_shard_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    write_labels(tmp_path, finish=False)
    frames, rng = np.array(LENGTHS[0]), random.Random(0)
    sound = {path: path.read_bytes() for path in tmp_path.glob("shard_00000.*")}
    harmless = 0
    for path, content in sound.items():
        for place in range(len(content)):
            flip(path, place, rng.randrange(8))
            if shard_fault(tmp_path, 0, IDS[0], frames) is None:
                # statistics, creator, schema: what is read is the same, as `shard_fault` compares ids and
                # frames, and the array's hash
                assert path.suffix == ".parquet"
                harmless += 1
            path.write_bytes(content)
    assert harmless < sum(map(len, sound.values())) / 2
    assert shard_fault(tmp_path, 0, IDS[0], frames) is None


def test_any_damage_to_an_unfinished_shard_keeps_it_from_being_finished(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", finish=False)
    for what, copy, path in damaged_copies(tmp_path / "labels", tmp_path, "shard_00000.npy"):
        assert path.name in str(shard_fault(copy, 0, IDS[0], np.array(LENGTHS[0]))), what
        with pytest.raises(ValueError, match=r"shard_00000\.npy|shard 0"):
            commit_labels(copy, 2, {}, {}, codebook="c0de", num_classes=7)
        assert not (copy / "meta.json").exists(), what


# Corpora


def write_units(folder: Path) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    frames = [np.repeat(rng.integers(0, 5, 30), rng.integers(1, 4, 30)).astype(np.uint16) for _ in range(9)]
    documents = [
        Document(f"d{number}", "train", *deduplicate(labels)) for number, labels in enumerate(frames)
    ]
    merges = learn((document.units for document in documents), 5, 9, 4, 2, 10_000)
    write_corpus(
        folder,
        documents,
        {},
        {},
        vocabulary=Vocabulary(num_units=5, merges=merges),
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=True,
    )
    return frames


def test_any_damage_to_any_file_of_a_corpus_is_told_by_its_name_and_nothing_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = write_units(tmp_path / "units")
    corpus = UnitCorpus(tmp_path / "units")
    assert all(np.array_equal(corpus.frames(i), labels) for i, labels in enumerate(frames))
    assert len(list((tmp_path / "units").iterdir())) == 6
    for what, copy, path in damaged_copies(tmp_path / "units", tmp_path):
        with pytest.raises(ValueError) as told:
            corpus = UnitCorpus(copy)
            for i in range(len(corpus)):
                corpus.frames(i)
        assert (path.name if path.name != "meta.json" else str(copy)) in str(told.value), what
        if path.name != "meta.json" or what.endswith("gone"):
            assert main(["check", str(copy)]) == 2, what
            capsys.readouterr()


def test_only_blocks_that_are_read_are_compared_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "BLOCK_BYTES", 64)
    monkeypatch.setattr(hashes, "PIECE_BYTES", 16)
    monkeypatch.setattr(arrays, "PIECE_BYTES", 16)
    path, array = tmp_path / "a.npy", np.arange(300, dtype=np.uint16).reshape(-1, 2)
    np.save(path, array)
    whole, blocks = sha256_blocks(path)
    assert whole == hashes.sha256_file(path) and len(blocks) == -(-path.stat().st_size // 64)
    flip(path, 128 + 4 * 100)  # row 100, in block 8
    checked = CheckedNpy(path, np.load(path, mmap_mode="r"), blocks, 64)
    for start in range(150):
        for stop in (start, start + 1, min(start + 40, 150)):
            if stop > start and start < 112 and stop > 96:
                with pytest.raises(ValueError, match=r"a\.npy: damaged"):
                    checked.read(start, stop)
            else:
                np.testing.assert_array_equal(checked.read(start, stop), array[start:stop])
    sound = checked.read(0, 96)
    monkeypatch.setattr(checked, "_compare", None)  # would be called
    np.testing.assert_array_equal(checked.read(0, 96), sound)
