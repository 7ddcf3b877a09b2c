"""The encoding benchmark on tiny models: both ways give the same labels, and what differs is counted and
weighed."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import corpus, encode, encode_pipelines
from benchmarks.contest import contest
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.model.config import EncoderConfig

SIZES = EncoderConfig(architecture="tiny", front_end="waveform", norm_first=False).resolved()
SETTINGS = {
    "sizes": SIZES,
    "layer": 1,
    "classes": 8,
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "seed": 0,
    "ours_batch_seconds": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    corpus.write_corpus(folder, np.array([24000, 16000, 8000]), 5, seed=0)
    encode.write_model(folder, SETTINGS)
    encode.write_codebook(folder, SETTINGS)
    ours = encode.build("ours", SETTINGS, folder)
    ours.prepare(0)
    ours.run()
    return folder


def lines_of(folder: Path) -> list[list[int]]:
    """Our labels, as a peer would write them."""
    labels = Labels(encode.labels_folder(folder, "ours", 0))
    return [labels[utterance].tolist() for utterance in Manifest(folder / "manifest").ids]


def write_lines(path: Path, lines: list[list[int]]) -> Path:
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("variant", encode.VARIANTS["transformers"])
def test_every_way_of_the_peer_reads_the_same_files_and_gives_our_labels(variant: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    ours, peer = encode.build("ours", SETTINGS, folder), encode.build(variant, SETTINGS, folder)
    assert ours.about() == peer.about()
    peer.run()
    assert ours.amount == peer.amount == 3.0
    found = encode.compare_labels(
        folder, encode.labels_folder(folder, "ours", 0), folder / f"{variant}.km", SETTINGS
    )
    # float32 on both sides, in another order: a label may turn where two centroids are equally far to six
    # digits
    assert found["labels_differ"] <= 1 and found["largest_margin"] < 1e-5
    assert len(np.unique(np.concatenate(lines_of(folder)))) > 4  # of eight: agreement that means something


def test_labels_that_differ_are_counted_and_weighed(folder: Path, tmp_path: Path) -> None:
    lines, ours = lines_of(folder), encode.labels_folder(folder, "ours", 0)
    assert encode.compare_labels(folder, ours, write_lines(tmp_path / "same", lines), SETTINGS) == {
        "labels_differ": 0,
        "largest_margin": 0.0,
    }
    lines[1][3] = (lines[1][3] + 1) % 8
    lines[2][0] = (lines[2][0] + 1) % 8
    found = encode.compare_labels(folder, ours, write_lines(tmp_path / "other", lines), SETTINGS)
    assert found["labels_differ"] == 2 and found["largest_margin"] > 1e-3  # another centroid, not a tie


def test_both_searches_of_the_peer_find_the_nearest_centroid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centroids, frames = (rng.standard_normal((count, 6)).astype(np.float32) for count in (7, 200))
    np.save(tmp_path / "centroids.npy", centroids)
    expected = np.square(frames[:, None].astype(np.float64) - centroids).sum(axis=2).argmin(axis=1)
    for make in (encode_pipelines.open_kmeans, encode_pipelines.open_formula):
        found = make(tmp_path / "centroids.npy", "cpu")(torch.from_numpy(frames))
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_the_timed_verb_leaves_out_its_check_and_the_check_is_asked_for_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "precision": "int8"}
    timed, apart = encode.build("ours", settings, folder), encode.build("agreement", settings, folder)
    timed.prepare(7)
    checked: list[int] = []
    real = timed.encoding.label_agreement  # type: ignore[attr-defined]
    monkeypatch.setattr("quantize.encoding.label_agreement", lambda *given: checked.append(1) or real(*given))
    timed.run()
    assert not checked
    about = apart.about()
    assert checked and set(about) == {"label_agreement"} and 0.5 < about["label_agreement"] <= 1


def test_the_longer_corpus_is_the_same_audio_four_times(folder: Path) -> None:
    encode.write_longer(folder)
    longer = encode.build("ours-long", SETTINGS, folder)
    assert longer.amount == 12.0
    assert len(set(Manifest(folder / "manifest_long").ids)) == 12


def test_usage_says_how_many_classes_there_are(folder: Path) -> None:
    lines = lines_of(folder)
    found = encode.usage(encode.labels_folder(folder, "ours", 0))
    counts = np.bincount(np.concatenate(lines))
    shares = counts[counts > 0] / counts.sum()
    assert found["frames"] == counts.sum() == 74 + 49 + 24 and found["classes_used"] == np.count_nonzero(
        counts
    )
    assert found["perplexity"] == pytest.approx(np.prod(shares**-shares))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--layer", "0"], "--layer 0: base has layers 1 to 12"),
        (["--classes", "500", "--total-seconds", "5"], "can be fitted on this corpus"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_mistake_ends_with_status_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode.main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_usual_way_takes_part_even_where_it_is_the_slowest(tmp_path: Path) -> None:
    settings = {
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "rounds": 1,
        "warmup": 0,
        "gemm_size": 64,
        "peak_tflops": None,
    }
    result = contest(
        "tests.benchmarks.sleepers",
        ["slow", "quick"],
        tmp_path,
        settings,
        1e6,
        peer_python=sys.executable,
        usual="slow",
    )
    turns = [line.split()[0] for line in (tmp_path / "turns.txt").read_text().splitlines()]
    assert turns[4:] == [
        "ours",
        "quick",
        "quick",
        "slow",
    ]  # after the four trials: the fastest, the fastest default, the usual
    assert result["peer_name"] == "quick-kept" and result["peer_name_usual"] == "slow"
    assert result["ratio_usual"] == result["ours"] / result["peer_usual"] > result["ratio"]


@pytest.mark.slow
def test_encode_ends_with_one_json_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(encode.VARIANTS, "transformers", [encode.USUAL, "transformers-cut-torch"])
    given = (
        "--architecture tiny --layer 1 --classes 8 --total-seconds 6 --rounds 2 --threads 1 --check-memory "
        "--precision int8 --json"
    )
    assert encode.main(given.split()) == 0
    printed = capsys.readouterr().out
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert (
        result["ratio"] == result["ours"] / result["peer"]
        and result["ratio_usual"] == result["ours"] / result["peer_usual"]
    )
    assert result["peer_name_usual"] == encode.USUAL and result["unit"] == "audio seconds per second"
    assert result["ours_about"]["inputs_sha256"] == result["peer_about"]["inputs_sha256"]
    assert (
        result["labels_differ"]
        == result["peer_labels"][encode.USUAL]["labels_differ"]
        <= 0.1 * result["frames"]
    )  # of int8
    assert result["rounds_agree"] and 0.5 < result["label_agreement"] <= 1
    assert 0.5 < result["ours_rss_flat"] < 1.5  # at this size imports are nearly all of it
    assert 0 < result["share_of_limit"] < 1 and result["limit"] > 0
    assert "labels differ" in printed and "label agreement" in printed
