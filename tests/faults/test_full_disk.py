"""A disk that becomes full while it is written to (a file system in memory, of 4 MiB; skipped where nothing
may be mounted).

Broken: there is no room for the next checkpoint, log line, shard of labels, token. Must hold: what stood
before stands, nothing half written is to be seen, the command ends with status 2 and one message that names
the file and the bytes needed and free, and no traceback; with room made, the same command goes on to the same
bytes as where there always was room.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pretrain.data.label_shards import shard_stands, write_shard
from pretrain.data.labels import Labels
from pretrain.store import artefact
from pretrain.store.artefact import keep_to_plan, read_meta
from pretrain.store.disk import DiskFull, atomic_folder, atomic_path, write_json
from pretrain.training.checkpoint import checkpoint_damage, latest_checkpoint
from quantize.codebook import write_codebook
from tests.faults.conftest import Disk
from tests.pretrain.linear_task import LinearTask, run_linear
from tests.quantize.conftest import write_corpus as write_tones
from units.corpus import corpus_writing as corpus_module
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from wordless.cli import main

BYTES = (
    r"needs (more than )?[\d,]+ bytes, [\d,]+ are free\. Earlier work is unharmed; make room and run the "
    r"same command again"
)


def write_sound(path: Path) -> None:
    import soundfile

    soundfile.write(path, np.zeros(2**18), 16000, format="WAV", subtype="DOUBLE")


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"word{i}": i for i in range(2**16)})).save(str(path))


def write_table(path: Path) -> None:
    with pq.ParquetWriter(path, pa.schema([("a", pa.float64())])) as writer:
        for _ in range(10):
            writer.write_table(pa.table({"a": np.random.default_rng(0).random(2**15)}))


def write_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(2**18))


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 2**21),
    "numpy": write_array,
    "safetensors": lambda path: save_file({"a": torch.zeros(2**18)}, path),
    "parquet": lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(2**18)}), path),
    "parquet, in pieces": write_table,
    "sound": write_sound,
    "tokenizer": write_tokenizer,
}


@pytest.mark.parametrize("library", WRITERS)
def test_whichever_library_writes_a_full_disk_is_told_and_the_old_file_stands(
    disk: Disk, library: str
) -> None:
    path = disk.path / "folder" / "file"
    write_json(path, "old")
    disk.leave(200_000)
    with (
        pytest.raises(DiskFull, match=rf"^{path}: no space left on the disk: {BYTES}$"),
        atomic_path(path) as temporary,
    ):
        WRITERS[library](temporary)
    assert json.loads(path.read_text()) == "old" and not disk.hidden
    with pytest.raises(DiskFull, match=BYTES), atomic_folder(disk.path / "other") as folder:
        WRITERS[library](folder / "file")
    assert not disk.hidden and not (disk.path / "other").exists()
    disk.make_room()
    with atomic_path(path) as temporary:
        WRITERS[library](temporary)
    assert path.stat().st_size > 200_000


def test_the_bytes_told_are_those_needed_and_free(disk: Disk) -> None:
    disk.leave(3 * 4096)
    needed = 128 + 2 * 50_000
    with pytest.raises(
        DiskFull, match=rf"shard_00000\.npy: .*: needs {needed:,} bytes, {3 * 4096:,} are free\."
    ):
        write_shard(disk.path, 0, ["a"], [np.zeros(50_000)])
    with pytest.raises(DiskFull, match=rf"needs more than {3 * 4096:,} bytes, {3 * 4096:,} are free"):
        write_json(disk.path / "a.json", "x" * 50_000)


def test_a_quota_is_told_as_one_and_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("12345")
            raise error

    with pytest.raises(DiskFull, match=rf"{tmp_path}/a: the quota is used up: needs more than 5 bytes, "):
        fail(OSError(errno.EDQUOT, "Disk quota exceeded"))
    for error in (
        ValueError("a"),
        KeyError("a"),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("a"),
        OSError("1 requested"),
    ):
        with pytest.raises(type(error)) as told:
            fail(error)
        assert told.value is error
    assert not list(tmp_path.iterdir())


# Training


def content(run: Path) -> dict[str, bytes]:
    newest = latest_checkpoint(run)
    assert newest is not None
    return {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines
    ]


class HeavyTask(LinearTask):
    """Its checkpoints are of half a megabyte."""

    def __init__(self, **options: Any):
        super().__init__(dropout=0.3, **options)
        self.model.register_buffer("ballast", torch.zeros(2**17))


def test_no_room_for_a_checkpoint_ends_the_run_and_the_old_one_stands(disk: Disk, tmp_path: Path) -> None:
    run_linear(tmp_path / "whole", HeavyTask())
    run = disk.path / "run"
    with pytest.raises(DiskFull, match=rf"^{run}/step_00000008: no space left on the disk: {BYTES}"):
        run_linear(run, HeavyTask(on_step=lambda step: disk.leave(300_000) if step == 6 else None))
    assert [path.name for path in run.glob("step_*")] == ["step_00000004"] and not disk.hidden
    assert checkpoint_damage(run / "step_00000004") == "" and not (run / "meta.json").exists()
    with pytest.raises(DiskFull, match="step_00000008"):  # still full, and still nothing lost
        run_linear(run, HeavyTask())
    disk.make_room()
    assert run_linear(run, HeavyTask())["steps_this_time"] == 8
    assert content(run) == content(tmp_path / "whole") and metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("log", ["metrics.jsonl", "tensorboard"])
def test_no_room_for_a_log_line_ends_the_run_no_worse_than_for_a_checkpoint(
    disk: Disk, tmp_path: Path, log: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 120, "checkpoint_every": 60, "log_every": 1}
    run_linear(tmp_path / "whole", HeavyTask(), training)
    run = disk.path / "run"
    filled = HeavyTask(on_step=lambda step: disk.leave(0) if step == 60 else None)
    with monkeypatch.context() as patched:
        if log == "metrics.jsonl":  # or the events, of which there are more, fill the last page first
            patched.setattr("pretrain.training.runlog.Board.add_scalars", lambda *_: None)
        with pytest.raises(DiskFull, match=rf"^{run}/{log}.*: no space left on the disk: {BYTES}"):
            run_linear(run, filled, training)
    assert "Traceback" not in capfd.readouterr().err
    steps = [line["step"] for line in metrics(run)]  # every line is a whole one
    assert steps == list(range(1, len(steps) + 1)) and 60 <= len(steps) < 120
    assert [path.name for path in run.glob("step_*")] == ["step_00000060"] and not disk.hidden
    disk.make_room()
    assert run_linear(run, HeavyTask(), training)["steps_this_time"] == 60
    assert content(run) == content(tmp_path / "whole") and metrics(run) == metrics(tmp_path / "whole")
    if log == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, 121))


# Labels


def test_no_room_for_a_shard_ends_encode_and_the_shards_before_it_stand(
    disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write_tones(tmp_path)
    centroids = np.random.default_rng(0).standard_normal((1, 7, 39)).astype(np.float32)
    write_codebook(tmp_path / "codebook", centroids, np.zeros(39), {"kind": "mfcc", "cmvn": True}, {}, {}, {})
    config = tmp_path / "encode.toml"
    config.write_text(f'manifest = "{manifest}"\ncodebook = "{tmp_path / "codebook"}"\nnum_shards = 6\n')
    assert main(["encode", str(config), f"out={tmp_path / 'whole'}"]) == 0
    out = disk.path / "labels"
    # In pages of 4 kB: the plan takes one, an array and a table one each; an array whose table did not fit
    # makes way for its successor; at last there is no room for meta.json. The record of the lock takes one
    # more where there is any.
    for pages, standing in ((0, 0), (1, 0), (2, 1), (3, 2), (4, 4), (3, 6)):
        disk.leave(4096 * (pages + 1 if pages else 0))
        capfd.readouterr()
        assert main(["encode", str(config), f"out={out}"]) == 2
        said = capfd.readouterr().err
        assert (
            len(re.findall(rf"wordless: {out}/\S+: no space left on the disk: {BYTES}\n", said)) == 1
            and "Traceback" not in said
        )
        assert not disk.hidden and not (out / "meta.json").exists()
        assert [shard_stands(out, shard) for shard in range(6)] == [True] * standing + [False] * (
            6 - standing
        )
        disk.make_room()
    assert main(["encode", str(config), f"out={out}"]) == 0
    assert read_meta(out)["fingerprint"] == read_meta(tmp_path / "whole")["fingerprint"]
    assert len(Labels(out)) == 12


# Unit corpora


def documents(count: int = 600) -> list[Document]:
    rng = np.random.default_rng(0)
    return [
        Document(f"d{i}", "train", rng.integers(0, 9, 900), rng.integers(1, 5, 900).astype(np.uint16))
        for i in range(count)
    ]


def pack(folder: Path) -> dict[str, Any]:
    """About a megabyte of tokens and as much of durations."""
    return write_corpus(
        folder,
        documents(),
        {},
        {},
        vocabulary=Vocabulary(num_units=9),
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=True,
    )


@pytest.mark.parametrize(
    "record_seconds", [0.0, 1000.0]
)  # it is recorded how far the files reach all the time, or never
@pytest.mark.parametrize("room", [0, 4096, 20_000, 700_000, 2_200_000])
def test_no_room_for_tokens_ends_pack_and_it_goes_on_to_the_same_bytes(
    disk: Disk, tmp_path: Path, room: int, record_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "RECORD_SECONDS", record_seconds)
    disk.leave(room)
    with pytest.raises(DiskFull, match=rf"^{disk.path}/units\S*: no space left on the disk: {BYTES}"):
        pack(disk.path / "units")
    assert not disk.hidden and not (disk.path / "units" / "meta.json").exists()
    recorded = disk.path / "units" / "partial" / "written.json"
    first = json.loads(recorded.read_text())["num_documents"] if recorded.is_file() else 0
    assert not first or (record_seconds == 0 and room >= 700_000)
    disk.make_room()
    pack(disk.path / "units")
    assert read_meta(disk.path / "units")["fingerprint"] == read_meta(tmp_path / "whole")["fingerprint"]
    assert sorted(os.listdir(disk.path / "units")) == sorted(os.listdir(tmp_path / "whole"))
    assert UnitCorpus(disk.path / "units").units(599).tolist() == documents()[599].units.tolist()


def test_a_folder_for_which_there_is_no_room_is_told(disk: Disk) -> None:
    with contextlib.ExitStack() as stack:
        inodes = os.statvfs(disk.path).f_favail
        stack.callback(lambda: [path.unlink() for path in disk.path.glob("inode*")])
        for number in range(inodes):
            (disk.path / f"inode{number}").touch()
        with pytest.raises(
            DiskFull, match=r"folder: no space left on the disk \(no inodes: it holds too many files\)"
        ):
            keep_to_plan(disk.path / "folder", {"a": 1})
        assert artefact.is_complete(disk.path) is False
