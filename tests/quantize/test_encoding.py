import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pretrain.data.labels import Labels, commit_labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import save_checkpoint
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook, write_codebook
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig, default_num_shards, plan_shards
from quantize.encoding_processes import _share_of_the_machine
from quantize.features import FeatureSource, MfccSource, open_encoder_source


@pytest.fixture(scope="module")
def mfcc_codebook(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("codebooks") / "mfcc")
    cluster(ClusterConfig(manifest=str(corpus), num_classes=8, out=out))
    return out


@pytest.fixture(scope="module")
def encoder_codebook(corpus: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("codebooks") / "encoder")
    cluster(
        ClusterConfig(
            manifest=str(corpus), num_classes=8, features="encoder", encoder=str(run), layer=2, out=out
        )
    )
    return out


def _power_cut(*_: Any, **__: Any) -> None:
    raise RuntimeError("power cut")


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("shard_*")}


def labels_by_id(folder: Path) -> dict[str, list[int]]:
    labels = Labels(folder)
    return {utterance: labels[utterance].tolist() for utterance in sorted(labels.ids)}


def test_encode_labels_every_frame_with_its_nearest_centroid(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    summary = encode(EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=3, out=str(out)))
    labels, codebook = Labels(out), Codebook.open(mfcc_codebook)
    assert labels.ids == Manifest(corpus).ids
    assert (labels.codebook, labels.num_classes, labels.frame_rate_hz) == (codebook.fingerprint, 8, 50.0)
    for utterance, features in MfccSource().features(list(Manifest(corpus))):
        distances = ((features[:, None] - (codebook.centroids[0] + codebook.mean)) ** 2).sum(axis=2)
        assert labels[utterance.id].tolist() == distances.argmin(axis=1).tolist()
    assert (
        summary["utterances"] == 12 and summary["num_shards"] == 3 and summary["audio_seconds_per_second"] > 0
    )
    assert 0 < summary["usage"] <= 1 <= summary["perplexity"] <= 8
    assert sorted(path.suffix for path in out.iterdir()) == [
        ".json",
        ".npy",
        ".npy",
        ".npy",
        ".parquet",
        ".parquet",
        ".parquet",
    ]


def test_labels_do_not_depend_on_shards_or_workers(
    corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path
) -> None:
    found = []
    for shards, workers in ((1, 1), (5, 3), (100, 2)):
        out = tmp_path / f"labels{shards}"
        keys: dict[str, Any] = {
            "manifest": str(corpus),
            "codebook": encoder_codebook,
            "encoder": str(run),
            "out": str(out),
        }
        summary = encode(EncodeConfig(num_shards=shards, workers=workers, **keys))
        assert summary["num_shards"] <= 12
        found.append(labels_by_id(out))
    assert found[0] == found[1] == found[2]


def test_a_lower_precision_tells_how_many_labels_agree_with_float32(
    corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "codebook": encoder_codebook, "encoder": str(run)}
    assert "label_agreement" not in encode(EncodeConfig(**keys, out=str(tmp_path / "float32")))
    summary = encode(EncodeConfig(**keys, out=str(tmp_path / "int8"), precision="int8"))
    exact, quick = (labels_by_id(tmp_path / name) for name in ("float32", "int8"))
    same = np.concatenate([np.equal(exact[name], quick[name]) for name in exact])
    assert summary["label_agreement"] == pytest.approx(same.mean()) and same.mean() > 0.8


def test_shards_of_another_precision_are_not_added_to(
    corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": encoder_codebook,
        "encoder": str(run),
        "out": str(tmp_path / "out"),
    }
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr("quantize.encoding.commit_labels", _power_cut)
        encode(EncodeConfig(**keys, num_shards=3))
    with pytest.raises(ValueError, match="precision 'float32' there, 'bfloat16' now"):
        encode(EncodeConfig(**keys, num_shards=3, precision="bfloat16"))


def test_a_lost_shard_is_made_again_with_identical_bytes(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    config = EncodeConfig(
        manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "labels")
    )
    encode(config)
    whole = content(tmp_path / "labels")
    (tmp_path / "labels" / "meta.json").unlink()
    (tmp_path / "labels" / "shard_00002.parquet").unlink()  # the array without its table is not a shard
    untouched = (tmp_path / "labels" / "shard_00001.npy").stat().st_mtime_ns
    summary = encode(config)
    assert summary["shards_already_done"] == 3
    assert content(tmp_path / "labels") == whole
    assert (tmp_path / "labels" / "shard_00001.npy").stat().st_mtime_ns == untouched


def test_an_error_half_way_keeps_the_finished_shards_and_a_rerun_goes_on(
    corpus: Path, mfcc_codebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(
        manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "labels")
    )
    real, calls = Codebook.assign, []

    def assign(codebook: Codebook, features: np.ndarray) -> np.ndarray:
        calls.append(1)
        return real(codebook, features * (np.nan if len(calls) == 8 else 1))

    monkeypatch.setattr(Codebook, "assign", assign)
    with pytest.raises(
        ValueError, match=r"u07\.wav \(utterance 'u07'\): features: NaN or infinity in frame 0"
    ):
        encode(config)
    finished = content(tmp_path / "labels")
    assert len(finished) >= 2 and not (tmp_path / "labels" / "meta.json").exists()
    encode(config)
    encode(
        EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "again"))
    )
    assert content(tmp_path / "labels") == content(tmp_path / "again")


def test_unfinished_work_on_something_else_is_not_continued(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": mfcc_codebook,
        "out": str(tmp_path / "labels"),
    }
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "plan.json").write_text(
        '{"manifest": "x", "split": null, "codebook": "y", "num_shards": 8}'
    )
    with pytest.raises(ValueError, match="unfinished work on something else .*codebook 'y' there"):
        encode(EncodeConfig(**keys))


def test_an_encoder_that_is_not_the_codebook_s_is_an_error_naming_both(
    corpus: Path,
    run: Path,
    make_run: Callable[..., Path],
    encoder_codebook: str,
    mfcc_codebook: str,
    tmp_path: Path,
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "out": str(tmp_path / "labels")}
    other = make_run(tmp_path / "other", seed=1)
    own = Codebook.open(encoder_codebook).source["encoder"]
    with pytest.raises(
        ValueError, match=rf"{encoder_codebook} was fitted on encoder {own}, and {other} is encoder \w+"
    ):
        encode(EncodeConfig(codebook=encoder_codebook, encoder=str(other), **keys))
    with pytest.raises(ValueError, match="quantises layer 2 of encoder .* give its run folder"):
        encode(EncodeConfig(codebook=encoder_codebook, **keys))
    with pytest.raises(ValueError, match="quantises MFCC; remove encoder"):
        encode(EncodeConfig(codebook=mfcc_codebook, encoder=str(run), **keys))
    assert not (tmp_path / "labels").exists()


def test_one_split_can_be_encoded_alone(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    summary = encode(
        EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, split="dev", out=str(tmp_path / "labels"))
    )
    assert (
        summary["utterances"] == 3 and Labels(tmp_path / "labels").ids == Manifest(corpus).select("dev").ids
    )


@given(st.lists(st.integers(400, 500_000), min_size=1, max_size=60), st.integers(1, 20))
def test_shards_hold_every_row_once_in_order_and_none_is_empty(lengths: list[int], num_shards: int) -> None:
    shards = plan_shards(np.array(lengths), num_shards)
    assert np.concatenate(shards).tolist() == list(range(len(lengths)))
    assert 1 <= len(shards) <= num_shards and all(len(shard) for shard in shards)
    assert max(sum(lengths[row] for row in shard) for shard in shards) <= sum(lengths) / num_shards + max(
        lengths
    )


# Which features a frame has does not depend on how the corpus is cut up


def write_untrained(folder: Path, **keys: Any) -> Path:
    torch.manual_seed(0)
    config = EncoderConfig(**keys)
    model = nn.Module()
    model.encoder = Encoder(config)
    state = {"kind": "pretraining", "config": {"encoder": config.resolved()}, "extra": {}}
    save_checkpoint(folder, 1, model, torch.optim.AdamW(model.parameters()), state)
    return folder


def write_border_codebook(folder: Path, source: FeatureSource, frames: np.ndarray) -> Codebook:
    """Every frame lies midway between two centroids of its own."""
    rng = np.random.default_rng(0)
    gaps = np.array([np.sort(((frames - frame) ** 2).sum(axis=1))[1] for frame in frames]) ** 0.5
    directions = rng.standard_normal(frames.shape)
    directions *= 0.2 * gaps[:, None] / np.linalg.norm(directions, axis=1, keepdims=True)
    centroids = np.concatenate([frames + directions, frames - directions]).astype(np.float32)
    describe = source.describe()
    write_codebook(
        folder, centroids[None], np.zeros(source.dim), describe, {}, {}, {"encoder": describe["encoder"]}
    )
    return Codebook.open(folder)


BORDERS = {
    "filterbank": {"architecture": "small", "num_layers": 2},
    "waveform": {
        "architecture": "tiny",
        "front_end": "waveform",
        "norm_first": False,
        "conv_norm": "group",
        "dim": 256,
        "ffn_dim": 1024,
    },
}


def on_borders(kind: str, corpus: Path, folder: Path, changes: list[tuple[int, dict[str, Any]]]) -> None:
    """Encode with each number of threads and changed settings: not one label differs from the codebook's of
    the source's features."""
    run = write_untrained(folder / "run", **BORDERS[kind])
    source = open_encoder_source(str(run), 2, device="cpu")
    found = {utterance.id: features for utterance, features in source.features(list(Manifest(corpus)))}
    frames = np.concatenate(list(found.values()))
    codebook = write_border_codebook(folder / "codebook", source, frames)
    noise = 1e-6 * np.random.default_rng(1).standard_normal(frames.shape).astype(np.float32)
    # This can fail: differences in the last bits, such as another number of rows makes, turn many labels
    # over.
    assert (codebook.assign(frames) != codebook.assign(frames + noise)).mean() > 0.05
    expected, threads = (
        {name: codebook.assign(features).tolist() for name, features in found.items()},
        torch.get_num_threads(),
    )
    try:
        for number, (num_threads, changed) in enumerate(changes):
            torch.set_num_threads(num_threads)
            out = folder / f"labels{number}"
            encode(
                EncodeConfig(
                    manifest=str(corpus),
                    codebook=str(codebook.folder),
                    encoder=str(run),
                    out=str(out),
                    **changed,
                )
            )
            assert labels_by_id(out) == expected, changed
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", BORDERS)
def test_not_one_frame_on_a_border_depends_on_batches_shards_or_threads(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    changes: list[tuple[int, dict[str, Any]]] = [
        (1, {"num_shards": 1}),
        (2, {"num_shards": 5, "workers": 3}),
        (2, {"batch_seconds": 4.0}),
        (1, {"num_shards": 100, "batch_seconds": 0.0}),
    ]
    on_borders(kind, corpus, tmp_path, changes)


@pytest.mark.slow  # torch is imported four times
@pytest.mark.parametrize("kind", BORDERS)
def test_not_one_frame_on_a_border_depends_on_processes(corpus: Path, tmp_path: Path, kind: str) -> None:
    on_borders(
        kind,
        corpus,
        tmp_path,
        [(1, {"num_shards": 3, "processes": 2}), (2, {"num_shards": 4, "processes": 2})],
    )


# Kills, and several processes at once

HARNESS = """
import json, os, random, signal, sys, time
from pathlib import Path

from pretrain.data.labels import shard_stands
from quantize import encoding, features

config, task = json.loads(sys.argv[1]), sys.argv[2]
out, rng, load = Path(config["out"]), random.Random(0), features.load_audio

def slow(utterance):
    time.sleep(0.15)
    return load(utterance)

def kill_at(step):  # of the calls that make files durable and give them their names
    calls = iter(range(step))
    def counted(function):
        def call(*arguments):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)

def start(prepare=lambda: None):
    if (child := os.fork()) == 0:
        status = 1
        try:
            prepare()
            encoding.encode(encoding.EncodeConfig(**config))
            status = 0
        finally:
            os._exit(status)
    return child

def finish(child):
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

def kill(child):
    os.kill(child, signal.SIGKILL)
    return not finish(child)

if task == "random":
    import pretrain.model.encoder  # here, so that no fork pays for it; nothing is computed before the forks, so that no thread is lost in them

    features.load_audio, landed = slow, {}
    for shard in range(3):
        while not shard_stands(out, shard) and landed.get(shard, 0) < 5:
            child = start()
            time.sleep(rng.uniform(0, 0.25))  # three utterances and more take longer
            landed[shard] = landed.get(shard, 0) + kill(child)
        child = start()
        while not shard_stands(out, shard) and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        kill(child)
    if not encoding.is_complete(out):
        assert finish(start())
    print(json.dumps(landed))
elif task == "steps":
    step = 0
    while True:
        config["out"] = f"{out}{step}"
        if finish(start(lambda: kill_at(step))):
            break
        left = sorted(os.listdir(config["out"])) if os.path.isdir(config["out"]) else []
        finished = encoding.is_complete(config["out"])  # killed after the last rename
        assert finished or finish(start())
        print(json.dumps([config["out"], left, finished]))
        step += 1
else:
    features.load_audio = slow
    children = [start() for _ in range(3)]
    assert all([finish(child) for child in children])
"""


def harness(task: str, **config: Any) -> list[Any]:
    command = [sys.executable, "-c", HARNESS, json.dumps(config), task]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_five_random_kills_in_every_shard_leave_no_trace(
    corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": encoder_codebook,
        "encoder": str(run),
        "num_shards": 3,
        "workers": 1,
    }
    encode(EncodeConfig(**keys, out=str(tmp_path / "whole")))
    (landed,) = harness("random", **keys, out=str(tmp_path / "killed"))
    assert landed.keys() == {"0", "1", "2"} and min(landed.values()) >= 5
    assert (
        content(tmp_path / "killed") == content(tmp_path / "whole")
        and Labels(tmp_path / "killed").ids == Manifest(corpus).ids
    )
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
        ["meta.json", *content(tmp_path / "whole")]
    )


def test_a_kill_before_any_step_of_any_file_leaves_no_trace(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "codebook": mfcc_codebook, "num_shards": 2}
    encode(EncodeConfig(**keys, out=str(tmp_path / "whole")))
    killed = harness("steps", **keys, out=str(tmp_path / "killed"))
    # file, rename, folder; of the plan, two files a shard, meta.json
    assert len(killed) == 3 * (1 + 2 * 2 + 1)
    assert any(name.endswith(".tmp") for _, left, _ in killed for name in left)
    for out, _, finished in killed:
        assert content(Path(out)) == content(tmp_path / "whole") and Labels(out).ids == Manifest(corpus).ids
        assert finished or sorted(path.name for path in Path(out).iterdir()) == sorted(
            ["meta.json", *content(tmp_path / "whole")]
        )


def test_processes_that_do_the_same_shards_at_once_do_no_harm(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "codebook": mfcc_codebook, "num_shards": 4}
    whole = encode(EncodeConfig(**keys, out=str(tmp_path / "whole")))
    harness("together", **keys, out=str(tmp_path / "labels"))
    assert content(tmp_path / "labels") == content(tmp_path / "whole") and whole["num_shards"] == 4
    assert read_meta(tmp_path / "labels")["fingerprint"] == read_meta(tmp_path / "whole")["fingerprint"]
    assert not (tmp_path / "labels" / "plan.json").exists()


def test_processes_share_the_shards_and_name_a_file_that_cannot_be_read(
    mfcc_codebook: str, make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path, num_utterances=10)
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": mfcc_codebook,
        "num_shards": 5,
        "processes": 2,
    }
    damaged = tmp_path / "u06.wav"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"u06\.wav \(utterance 'u06'\): is truncated"):
        encode(EncodeConfig(**keys, out=str(tmp_path / "labels")))
    assert not multiprocessing.active_children() and not (tmp_path / "labels" / "meta.json").exists()
    damaged.write_bytes(sound)
    summary = encode(EncodeConfig(**keys, out=str(tmp_path / "labels")))
    alone = encode(EncodeConfig(**{**keys, "processes": 1}, out=str(tmp_path / "alone")))
    assert content(tmp_path / "labels") == content(tmp_path / "alone")
    assert {"seconds", "audio_seconds_per_second"} <= summary.keys() == alone.keys() and summary[
        "usage"
    ] == alone["usage"]


def test_a_killed_process_ends_the_others_and_is_told_of(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    config = EncodeConfig(
        manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, processes=2, out=str(tmp_path / "labels")
    )
    with pytest.raises(
        ValueError, match=r"one of 2 processes was ended by SIGKILL, .* memory .* \d of 4 shards are done"
    ):
        encode(config)
    killer.join()
    assert not multiprocessing.active_children()
    assert encode(config.model_copy(update={"processes": 1}))["utterances"] == 12


def test_each_process_has_its_share_of_the_threads_and_a_gpu_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = EncodeConfig(manifest="m", codebook="c", out="o", encoder="run", processes=3)
    names, found = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"), []
    for number in range(3):
        with _share_of_the_machine(config, number, 3):
            found.append([os.environ[name] for name in names])
    assert found == [["2", "4"], ["2", "6"], ["2", "4"]]
    assert [os.environ.get(name) for name in names] == [None, "4,6"]
    with _share_of_the_machine(config.model_copy(update={"device": "cpu"}), 1, 9):
        assert [os.environ[name] for name in names] == ["1", "4,6"]


# Parts, for machines that share a disk


def test_parts_do_their_share_and_the_last_one_commits(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": mfcc_codebook,
        "num_shards": 5,
        "out": str(tmp_path / "labels"),
    }
    summary = encode(EncodeConfig(**keys, part="2/3"))
    assert (summary["shards_missing"], summary["shards_already_done"], summary["num_shards"]) == (3, 0, 5)
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.npy")) == [
        "shard_00001.npy",
        "shard_00004.npy",
    ]
    assert encode(EncodeConfig(**keys, part="3/3"))["shards_missing"] == 2
    assert encode(EncodeConfig(**keys, part="3/3"))["shards_already_done"] == 1
    assert "shards_missing" not in encode(EncodeConfig(**keys, part="1/3"))
    encode(EncodeConfig(**{**keys, "out": str(tmp_path / "whole")}))
    metas = [read_meta(tmp_path / name) for name in ("labels", "whole")]
    assert metas[0]["fingerprint"] == metas[1]["fingerprint"] and metas[0]["config"]["part"] is None
    late = encode(EncodeConfig(**keys, part="3/3"))  # a job that starts when all is done
    assert late["utterances"] == 12 and late["shards_already_done"] == 1
    with pytest.raises(
        ValueError, match="holds finished labels of something else .*split None there, 'dev' now"
    ):
        encode(EncodeConfig(**keys, part="3/3", split="dev"))
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        encode(EncodeConfig(**keys))


def test_two_parts_may_commit_at_once(
    corpus: Path, mfcc_codebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(
        manifest=str(corpus), codebook=mfcc_codebook, num_shards=3, out=str(tmp_path / "labels"), part="1/1"
    )
    real = commit_labels

    def other_first(*arguments: Any, **keys: Any) -> str:
        monkeypatch.setattr("quantize.encoding.commit_labels", real)
        encode(config)  # from its beginning to its end while this one is about to commit
        return real(*arguments, **keys)

    monkeypatch.setattr("quantize.encoding.commit_labels", other_first)
    assert encode(config)["utterances"] == 12
    assert (
        Labels(tmp_path / "labels").ids == Manifest(corpus).ids
        and not (tmp_path / "labels" / "plan.json").exists()
    )


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "a/b", "1/", "-1/4"])
def test_a_part_is_one_of_so_many(part: str) -> None:
    with pytest.raises(ValueError, match='write "2/16" for the second of sixteen parts'):
        EncodeConfig(manifest="m", codebook="c", out="o", part=part)


# Shards that stand but are not what they should be


def test_damaged_shards_are_made_again(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    config = EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=6, out=str(out))
    encode(config)
    whole = content(out)
    (out / "meta.json").unlink()
    array = out / "shard_00000.npy"
    array.write_bytes(array.read_bytes()[:-2])
    (out / "shard_00001.npy").write_bytes(b"")
    (out / "shard_00002.npy").unlink()
    table = out / "shard_00003.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    for suffix in (".npy", ".parquet"):  # whole, and another's
        shutil.copy(out / f"shard_00005{suffix}", out / f"shard_00004{suffix}")
    assert encode(config)["shards_already_done"] == 1
    assert content(out) == whole


def test_another_part_s_damaged_shard_is_not_merged(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": mfcc_codebook,
        "num_shards": 4,
        "out": str(out),
    }
    encode(EncodeConfig(**keys, part="1/2"))
    array = np.load(out / "shard_00000.npy")
    np.save(out / "shard_00000.npy", array[:-1])
    with pytest.raises(
        ValueError, match=rf"shard_00000\.npy: {len(array) - 1} frames where the index has {len(array)}"
    ):
        encode(EncodeConfig(**keys, part="2/2"))
    assert not (out / "meta.json").exists()
    encode(EncodeConfig(**keys))
    assert Labels(out).ids == Manifest(corpus).ids


def test_a_file_that_changed_since_it_was_indexed_ends_the_run_by_its_name(
    mfcc_codebook: str, make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path, num_utterances=8)
    config = EncodeConfig(
        manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "labels"), workers=1
    )
    (tmp_path / "u05.wav").unlink()
    with pytest.raises(ValueError, match=r"u05\.wav \(utterance 'u05'\): no such file"):
        encode(config)
    assert len(content(tmp_path / "labels")) >= 2 and not (tmp_path / "labels" / "meta.json").exists()


# Levels, memory, the number of shards


def test_levels_have_their_usage_and_agreement_each(corpus: Path, run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "codebook")
    cluster(
        ClusterConfig(
            manifest=str(corpus),
            num_classes=6,
            levels=2,
            features="encoder",
            encoder=str(run),
            layer=2,
            out=out,
        )
    )
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": out,
        "encoder": str(run),
        "precision": "int8",
    }
    summary = encode(EncodeConfig(**keys, out=str(tmp_path / "labels")))
    labels = Labels(tmp_path / "labels")
    classes = np.concatenate([labels[name] for name in labels.ids])
    assert classes.shape == (Manifest(corpus).num_frames.sum(), 2)
    assert summary["usage_by_level"] == [len(np.unique(level)) / 6 for level in classes.T]
    assert (
        summary["usage"] == summary["usage_by_level"][0]
        and summary["perplexity"] == summary["perplexity_by_level"][0]
    )
    assert 0.5 < summary["label_agreement_all_levels"] <= summary["label_agreement"] <= 1


def write_copies(folder: Path, corpus: Path, copies: int) -> Path:
    """A manifest with every recording so many times."""
    rows = [
        {
            "id": f"{copy:03d}-{row.id}",
            "path": row.path,
            "start": 0,
            "num_samples": row.num_samples,
            "sample_rate": 16000,
        }
        for copy in range(copies)
        for row in Manifest(corpus)
    ]
    write_manifest(folder, rows, {}, {})
    return folder


MEMORY = """
import sys
from quantize.encoding import EncodeConfig, encode

manifest, codebook, out, processes, *encoder = sys.argv[1:]
encode(EncodeConfig(manifest=manifest, codebook=codebook, out=out, processes=int(processes), encoder=encoder[0] if encoder else None))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def start_encode(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("features", ["mfcc", pytest.param("encoder", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_corpus(
    features: str, corpus: Path, run: Path, mfcc_codebook: str, encoder_codebook: str, tmp_path: Path
) -> None:
    codebook, encoder = (mfcc_codebook, ()) if features == "mfcc" else (encoder_codebook, (run,))
    peaks = []
    for copies in (10, 80):
        manifest = write_copies(tmp_path / f"manifest{copies}", corpus, copies)
        peaks.append(
            int(start_encode(manifest, codebook, tmp_path / f"labels{copies}", 1, *encoder).communicate()[0])
        )
    # kB; the longer one has 840 rows and 11 minutes of audio more: 40 MB as samples, 22 MB as features of 8
    # dimensions and more
    assert peaks[1] < peaks[0] + 8_000, peaks


@pytest.mark.slow  # eight imports, and audio for some seconds
def test_the_processes_of_a_killed_one_end_by_themselves_and_leave_no_trace(
    corpus: Path, mfcc_codebook: str, tmp_path: Path
) -> None:
    manifest = write_copies(tmp_path / "manifest", corpus, 150)
    encode(EncodeConfig(manifest=str(manifest), codebook=mfcc_codebook, out=str(tmp_path / "whole")))
    out = tmp_path / "labels"
    for shards in (1, 3):
        parent = start_encode(manifest, mfcc_codebook, out, 2)
        while len(content(out)) < 2 * shards and parent.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) >= 2
        parent.kill()
        parent.communicate()
        deadline = time.monotonic() + 20
        while any(
            Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()
            for child in children
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert start_encode(manifest, mfcc_codebook, out, 2).wait() == 0
    assert content(out) == content(tmp_path / "whole")


def test_by_default_a_shard_is_half_an_hour_of_audio_within_limits() -> None:
    assert [default_num_shards(3600 * hours) for hours in (0.1, 4, 100, 500, 60_000)] == [
        8,
        8,
        200,
        1000,
        1000,
    ]
