import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import parse_config
from pretrain.data.manifest import Manifest
from pretrain.store.artefact import commit, read_meta
from pretrain.store.disk import write_json
from quantize import clustering
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook
from quantize.features import MfccSource, open_encoder_source


def test_cluster_fits_mfcc_and_says_what_it_did(corpus: Path, tmp_path: Path) -> None:
    summary = cluster(
        ClusterConfig(manifest=str(corpus), split="train", num_classes=8, out=str(tmp_path / "codebook"))
    )
    codebook = Codebook.open(tmp_path / "codebook")
    frames = sum(utterance.num_frames for utterance in Manifest(corpus).select("train"))
    assert summary["frames"] == frames and summary["num_classes"] == codebook.num_classes == 8
    assert {"inertia", "iterations", "empty_reseeded", "num_empty", "seconds"} <= set(summary) and summary[
        "num_levels"
    ] == 1
    assert codebook.source == {"kind": "mfcc", "cmvn": False} and codebook.dim == 39
    assert codebook.meta["parents"] == {"manifest": Manifest(corpus).fingerprint}
    assert (
        codebook.meta["fit"]["inertia"] == summary["inertia"] == codebook.meta["fit"]["levels"][0]["inertia"]
    )
    assert "num_speakers" not in summary  # the manifest knows none
    assert sorted(path.name for path in (tmp_path / "codebook").iterdir()) == [
        "centroids.safetensors",
        "meta.json",
    ]


def test_the_summary_says_how_alike_the_speakers_shares_are(
    make_corpus: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus(tmp_path, num_utterances=6)
    monkeypatch.setattr("quantize.subsample.speaker_numbers", lambda rows: np.arange(len(rows)) % 2)
    config = {"manifest": str(manifest), "num_classes": 2, "frames": 61}
    summary = cluster(ClusterConfig(**config, out=str(tmp_path / "codebook")))
    assert (summary["num_speakers"], summary["frames"], summary["utterances"]) == (2, 61, 6)
    assert (summary["smallest_speaker_share"], summary["largest_speaker_share"]) == (30 / 61, 31 / 61)


def test_a_seed_gives_the_same_codebook_whatever_decodes_it_and_whatever_memory_there_is(
    corpus: Path, tmp_path: Path
) -> None:
    fingerprints = []
    for number, (seed, workers, memory_gb) in enumerate([(0, 1, 8.0), (0, 3, 0.0), (1, 1, 8.0)]):
        out = str(tmp_path / f"codebook{number}")
        keys: dict[str, Any] = {"seed": seed, "workers": workers, "memory_gb": memory_gb}
        cluster(ClusterConfig(manifest=str(corpus), num_classes=6, frames=180, levels=2, out=out, **keys))
        fingerprints.append(Codebook.open(out).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


WORKER = """
import json, os, random, signal, sys, time

import torch  # here, so that no fork pays for it; nothing is computed before the forks, so that no thread is lost in them

from quantize import assignment, clustering, features, kmeans, subsample
from pretrain.store.artefact import is_complete

config, kills, rng = json.loads(sys.argv[1]), int(sys.argv[2]), random.Random(0)
subsample.PIECE_SECONDS, subsample.RECORD_SECONDS, kmeans.SAVE_SECONDS, assignment.BLOCK = 0.5, 0.0, 0.0, 64
partial = config["out"] + "/partial"

def recorded():  # when that was written which a later run goes on from
    try:
        files = [f"{partial}/{name}" for name in ("collected.json", "kmeans.safetensors")]
        return [os.stat(file).st_mtime_ns for file in files if os.path.exists(file)]
    except FileNotFoundError:
        return []

def killed():  # at some moment after it came further than the one before; False if it was done
    before = recorded()
    if (child := os.fork()) == 0:
        try:
            clustering.cluster(clustering.ClusterConfig(**config))
        finally:
            os._exit(0 if is_complete(config["out"]) else 1)
    while recorded() == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL

landed = []
while len(landed) < kills and not is_complete(config["out"]):
    if killed():
        landed.append(sorted(os.listdir(partial)) if os.path.isdir(partial) else [])
if not is_complete(config["out"]):
    clustering.cluster(clustering.ClusterConfig(**config))
print(json.dumps(landed))
"""


def start_worker(out: Path, config: dict[str, Any], kills: int, threads: int) -> "subprocess.Popen[str]":
    """`cluster` in a process of its own, killed so many times on the way; it prints what then lay in
    `partial/`."""
    arguments = [json.dumps({**config, "out": str(out)}), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_kills_and_threads_leave_no_trace_in_the_codebook(corpus: Path, tmp_path: Path) -> None:
    config = {
        "manifest": str(corpus),
        "num_classes": 24,
        "frames": 400,
        "levels": 2,
        "restarts": 2,
        "tolerance": 0.0,
    }
    whole = start_worker(tmp_path / "whole", config, kills=0, threads=1)
    killed = start_worker(tmp_path / "killed", config, kills=20, threads=2)
    outputs = [worker.communicate()[0] for worker in (whole, killed)]
    assert (whole.returncode, killed.returncode) == (0, 0)
    landed = json.loads(outputs[1])
    assert len(landed) >= 5, landed  # on a fast machine it may be done before the twentieth
    assert any("collected.json" in files for files in landed), landed
    assert Codebook.open(tmp_path / "whole").fingerprint == Codebook.open(tmp_path / "killed").fingerprint
    # clears away what a kill right after the commit left
    with pytest.raises(ValueError, match="already holds"):
        cluster(ClusterConfig(**{**config, "out": str(tmp_path / "killed")}))
    assert not (tmp_path / "killed" / "partial").exists()


def test_killed_in_k_means_it_asks_for_no_audio_and_no_sweep_again(
    corpus: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ClusterConfig(
        manifest=str(corpus),
        features="encoder",
        encoder=str(run),
        num_classes=4,
        frames=100,
        out=str(tmp_path / "codebook"),
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, "kmeans", interrupted)
        cluster(config)
    partial = tmp_path / "codebook" / "partial"
    assert {"plan.json", "choice.json", "collected.json", "sample.npy"} <= {
        path.name for path in partial.iterdir()
    }
    monkeypatch.setattr("quantize.features.EncoderSource._run", interrupted)
    summary = cluster(config)
    assert summary["chosen_by"] == "highest PNMI on 'dev'" and not partial.exists()
    assert Codebook.open(config.out).source["layer"] == summary["layer"]


def interrupted(*arguments: Any, **keys: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "keys",
    [{"seed": 1}, {"frames": 90}, {"cmvn": True}, {"num_classes": 5}, {"levels": 2}, {"split": "train"}],
)
def test_unfinished_work_on_something_else_is_refused(
    keys: dict[str, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"manifest": str(corpus), "num_classes": 4, "frames": 80, "out": str(tmp_path / "codebook")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, "kmeans", interrupted)
        cluster(ClusterConfig(**config))
    with pytest.raises(ValueError, match=f"holds unfinished work on something else.*{next(iter(keys))}"):
        cluster(ClusterConfig(**config | keys))
    cluster(ClusterConfig(**config, workers=1, memory_gb=0.0))  # which decide nothing


def test_a_mistake_before_any_work_leaves_nothing_to_remove(
    corpus: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "manifest": str(corpus),
        "features": "encoder",
        "encoder": str(run),
        "num_classes": 4,
        "out": str(tmp_path / "c"),
    }
    with pytest.raises(ValueError, match="no utterances of split 'valid'"):
        cluster(ClusterConfig(**config, select_split="valid"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="the sample needs 25,600 bytes of disk and 9 are free"),
    ):
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 1, 9))  # type: ignore[attr-defined]
        cluster(ClusterConfig(**config, frames=100))
    assert not Path(config["out"]).exists()
    assert cluster(ClusterConfig(**config))["chosen_by"] == "highest PNMI on 'dev'"


def test_levels_keep_the_plain_codebook_and_lower_the_error_each(corpus: Path, tmp_path: Path) -> None:
    keys = {"manifest": str(corpus), "num_classes": 8}
    plain = cluster(ClusterConfig(**keys, out=str(tmp_path / "plain")))
    summary = cluster(ClusterConfig(**keys, levels=3, out=str(tmp_path / "levels")))
    one, three = Codebook.open(tmp_path / "plain"), Codebook.open(tmp_path / "levels")
    assert (
        three.num_levels == 3
        and np.array_equal(three.centroids[0], one.centroids[0])
        and np.array_equal(three.mean, one.mean)
    )
    assert summary["inertia"] == plain["inertia"] == summary["inertia_by_level"]["0"]
    frames = np.concatenate([features for _, features in MfccSource().features(list(Manifest(corpus)))])
    labels = three.assign(frames)
    assert labels.shape == (len(frames), 3) and np.array_equal(labels[:, 0], one.assign(frames))
    errors = [
        float(np.square(frames - three.decode(labels[:, :levels])).sum(axis=1).mean()) for levels in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    # Statistics and this are the same sum, of float32 features of size 1e2 in different orders of rounding.
    assert list(summary["inertia_by_level"].values()) == pytest.approx(errors, rel=1e-4)


def test_spherical_centroids_are_directions_and_labels_the_smallest_angles(
    corpus: Path, tmp_path: Path
) -> None:
    cluster(
        ClusterConfig(manifest=str(corpus), num_classes=8, spherical=True, out=str(tmp_path / "codebook"))
    )
    codebook = Codebook.open(tmp_path / "codebook")
    # float32 rounding of 39 squares
    np.testing.assert_allclose(np.linalg.norm(codebook.centroids[0], axis=1), 1, atol=1e-6)
    frames = np.concatenate([features for _, features in MfccSource().features(list(Manifest(corpus)))])
    cosines = (frames - codebook.mean).astype(np.float64) @ codebook.centroids[0].T
    best = cosines.max(axis=1)
    chosen = cosines[np.arange(len(frames)), codebook.assign(frames)]
    assert (best - chosen <= 1e-5 * np.abs(best)).all()  # centroids are of length 1 to a rounding only


def test_the_best_layer_is_the_one_with_the_highest_dev_pnmi(corpus: Path, run: Path, tmp_path: Path) -> None:
    config = ClusterConfig(
        manifest=str(corpus),
        split="train",
        features="encoder",
        encoder=str(run),
        layer="best",
        num_classes=8,
        out=str(tmp_path / "c"),
    )
    summary = cluster(config)
    assert set(summary["sweep"]) == {"0", "1", "2"} and all(
        0 <= score <= 1 for score in summary["sweep"].values()
    )
    assert summary["sweep"][str(summary["layer"])] == max(summary["sweep"]["1"], summary["sweep"]["2"])
    assert summary["chosen_by"] == "highest PNMI on 'dev'"
    codebook = Codebook.open(config.out)
    assert codebook.source["layer"] == summary["layer"] and codebook.dim == 64
    assert codebook.meta["parents"]["encoder"] == codebook.source["encoder"]


def test_without_alignments_the_best_layer_is_the_middle_one_and_says_so(
    make_corpus: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    manifest = make_corpus(tmp_path, phones=False, num_utterances=4)
    summary = cluster(
        ClusterConfig(
            manifest=str(manifest),
            features="encoder",
            encoder=str(run),
            num_classes=4,
            out=str(tmp_path / "codebook"),
        )
    )
    assert summary["layer"] == 1 and "the middle one: 1 of 2" in summary["chosen_by"]


def write_sweep(folder: Path, encoder: str, layer: int = 1, convention: str = "residual") -> Path:
    """A finished sweep over layers that recommends `layer`."""
    folder.mkdir()
    write_json(folder / "summary.json", {})
    choice = {"layer": layer, "chosen_by": "highest PNMI on 'dev'", "sweep": {"1": 0.4, "2": 0.3}}
    commit(
        folder,
        "layer-sweep",
        {"convention": convention},
        {"encoder": encoder},
        ["summary.json"],
        choice=choice,
    )
    return folder


@pytest.mark.parametrize("layer", [1, 2])
def test_the_best_layer_is_the_one_that_a_sweep_recommends(
    layer: int, corpus: Path, run: Path, tmp_path: Path
) -> None:
    encoder = open_encoder_source(str(run), 0, device="cpu").fingerprint
    keys = {
        "manifest": str(corpus),
        "features": "encoder",
        "encoder": str(run),
        "num_classes": 4,
        "frames": 100,
    }
    sweep = write_sweep(tmp_path / "layers", encoder, layer)
    summary = cluster(
        ClusterConfig(**keys, sweep=str(sweep), select_split="none", out=str(tmp_path / "followed"))
    )
    assert summary["layer"] == layer and summary["sweep"] == {"1": 0.4, "2": 0.3}
    followed = Codebook.open(tmp_path / "followed")
    assert followed.source["layer"] == layer and followed.meta["fit"]["chosen_by"] == "highest PNMI on 'dev'"
    assert followed.meta["parents"]["sweep"] == read_meta(sweep)["fingerprint"]
    cluster(ClusterConfig(**keys, layer=layer, out=str(tmp_path / "given")))
    assert followed.fingerprint == Codebook.open(tmp_path / "given").fingerprint


def test_a_sweep_of_another_encoder_or_other_features_is_refused(
    corpus: Path, run: Path, tmp_path: Path
) -> None:
    encoder = open_encoder_source(str(run), 0, device="cpu").fingerprint
    keys = {
        "manifest": str(corpus),
        "features": "encoder",
        "encoder": str(run),
        "num_classes": 4,
        "out": str(tmp_path / "c"),
    }
    other, feeds = (
        write_sweep(tmp_path / "other", "0123456789abcdef"),
        write_sweep(tmp_path / "ff", encoder, 1, "feed_forward"),
    )
    for sweep, message in [
        (
            other,
            f"other is of encoder 0123456789abcdef, and .* is encoder {encoder}; give this encoder's sweep",
        ),
        (feeds, "ff is of 'feed_forward' features, and convention is 'residual'"),
        (run, "is a 'encoder'; a 'layer-sweep' is needed here|no meta.json"),
        (tmp_path / "none", "no such layer-sweep"),
    ]:
        with pytest.raises(ValueError, match=message):
            cluster(ClusterConfig(**keys, sweep=str(sweep)))
    assert not Path(keys["out"]).exists()


def test_more_classes_than_frames_is_an_error_that_names_both(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"num_classes: 5000 classes cannot be fitted on \d+ frames, and the manifest has no more",
    ):
        cluster(ClusterConfig(manifest=str(corpus), num_classes=5000, out=str(tmp_path / "codebook")))
    with pytest.raises(
        ValueError,
        match="num_classes: 50 classes cannot be fitted on 40 frames, and hours or frames allow no more",
    ):
        cluster(
            ClusterConfig(manifest=str(corpus), num_classes=50, frames=40, out=str(tmp_path / "codebook"))
        )
    assert not (tmp_path / "codebook").exists()


def test_an_unknown_split_or_select_split_is_an_error_that_names_the_known(
    corpus: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no utterances of split 'tran'; it has dev, train"):
        cluster(ClusterConfig(manifest=str(corpus), split="tran", out=str(tmp_path / "codebook")))
    with pytest.raises(ValueError, match="no utterances of split 'valid'"):
        cluster(
            ClusterConfig(
                manifest=str(corpus),
                features="encoder",
                encoder=str(run),
                select_split="valid",
                out=str(tmp_path / "codebook"),
            )
        )


def test_a_finished_codebook_is_not_overwritten_and_loses_what_a_kill_left_in_it(
    corpus: Path, tmp_path: Path
) -> None:
    config = ClusterConfig(manifest=str(corpus), num_classes=3, out=str(tmp_path / "codebook"))
    cluster(config)
    (tmp_path / "codebook" / "partial").mkdir()
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        cluster(config)
    assert not (tmp_path / "codebook" / "partial").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"features": "encoder"}, "go together"),
        ({"encoder": "runs/x"}, "go together"),
        ({"layer": 3}, "layer is a matter of encoders"),
        ({"features": "encoder", "encoder": "runs/x", "cmvn": True}, "cmvn is a matter of MFCC"),
        ({"features": "encoder", "encoder": "runs/x", "layer": "last"}, "layer"),
        ({"sweep": "runs/layers"}, "sweep is what layer = 'best' of an encoder follows"),
        (
            {"features": "encoder", "encoder": "runs/x", "layer": 2, "sweep": "runs/layers"},
            "sweep is what layer = 'best'",
        ),
        ({"hours": 1.0, "frames": 5000}, "hours and frames both say how much to fit on; give one"),
        ({"levels": 2, "spherical": True}, "spherical centroids are directions"),
        ({"balance": "speakers"}, "balance"),
        ({"num_classes": 70000}, "num_classes"),
        ({"num_clases": 5}, "did you mean 'num_classes'"),
    ],
)
def test_keys_that_do_not_fit_are_reported(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(ClusterConfig, {"manifest": "m", "out": "o", **keys}, "c.toml")


def test_ten_hours_are_the_default_and_a_resolved_config_reads_as_the_same() -> None:
    for keys, budget in (
        ({}, 1_800_000),
        ({"hours": 0.5}, 90_000),
        ({"frames": 777}, 777),
        ({"hours": 1e-9}, 1),
    ):
        config = parse_config(ClusterConfig, {"manifest": "m", "out": "o", **keys}, "c.toml")
        assert (
            config.budget == budget and parse_config(ClusterConfig, config.resolved(), "resolved") == config
        )
    assert parse_config(ClusterConfig, {"manifest": "m", "out": "o"}, "c.toml").resolved()["hours"] == 10.0
