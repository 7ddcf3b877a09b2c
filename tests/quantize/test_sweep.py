"""The sweep over layers beside the slow way, a layer at a time; what it recommends and writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.manifest import Manifest
from pretrain.objectives.pnmi import JointCounts, phone_metrics
from pretrain.store.artefact import read_meta
from quantize.assignment import nearest
from quantize.features import open_encoder_source
from quantize.judging import Judge
from quantize.kmeans import kmeans
from quantize.measuring import MeasureConfig, as_text, measure
from quantize.quality import usage_metrics
from quantize.subsample import Sample, frame_file
from quantize.sweep import (
    SWEEP_ITERATIONS,
    choose_layer,
    draw_utterances,
    plan_sweep,
    read_choice,
    recommend,
)


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def sweep(corpus: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "layers"
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "encoder": str(run),
        "fit_split": "train",
        "split": "dev",
    }
    measure(MeasureConfig(**keys, layers="all", num_classes=8, out=str(out)))
    return out


def test_every_layer_is_judged_as_it_would_be_alone(corpus: Path, run: Path, sweep: Path) -> None:
    layers = read_summary(sweep)["layers"]
    assert list(layers) == ["0", "1", "2"]
    train, dev = (Manifest(corpus).select(split) for split in ("train", "dev"))
    for layer, measures in layers.items():
        source = open_encoder_source(str(run), int(layer), device="cpu")
        sample = Sample(train, 20_000, seed=0)
        drawn = [
            features[sample.draw(utterance)[1]] for utterance, features in source.features(sample.utterances)
        ]
        frames = np.concatenate(drawn)
        fit = kmeans(frames, 8, seed=0, max_iterations=SWEEP_ITERATIONS)
        joint, counts = JointCounts(8), np.zeros(8, np.int64)
        for utterance, features in source.features(list(dev)):
            labels = nearest(features, fit.centroids[0], fit.mean)
            joint.add(utterance, labels)
            counts += np.bincount(labels, minlength=8)
        alone = {
            key: phone_metrics(joint.matrix()[1])[key] for key in ("pnmi", "phone_purity")
        } | usage_metrics(counts)
        assert {key: measures[key] for key in alone} == alone
        assert 0 < measures["phone_accuracy_features"] <= 1


def test_every_layers_abx_and_probes_are_of_that_layer(speech: str, run: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "manifest": speech,
        "encoder": str(run),
        "num_classes": 8,
        "abx_context": "phoneme",
    }
    config = MeasureConfig(**keys, layers="all", out=str(tmp_path / "layers"))
    summary = measure(config)
    rows = list(Manifest(speech))
    judge = Judge(rows, context="phoneme", silence=config.silence, brief=True)
    seen = []
    for layer, measures in summary["layers"].items():
        source = open_encoder_source(str(run), int(layer), device="cpu")
        features = {utterance.id: found for utterance, found in source.features(rows)}
        sample = Sample(Manifest(speech), 20_000, seed=0)
        fit = kmeans(
            np.concatenate([features[u.id][sample.draw(u)[1]] for u in sample.utterances]),
            8,
            max_iterations=SWEEP_ITERATIONS,
        )
        units = {name: nearest(found, fit.centroids[0], fit.mean) for name, found in features.items()}
        alone = judge.of_features(features) | judge.of_units(units, 8)
        assert set(alone) >= {
            "abx_within_features",
            "abx_across_features",
            "phone_accuracy_features",
            "phone_accuracy",
            "speaker_accuracy",
            "speaker_frame_accuracy",
        }
        assert {key: measures[key] for key in alone} == alone
        seen.append(judge.of_features(features))
    assert seen[0] != seen[1] != seen[2] != seen[0]  # layers taken for each other would show


def test_a_sweep_and_layer_best_fit_and_judge_alike_however_many_classes(
    make_corpus: Callable[..., Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.sweep.SWEEP_FRAMES", 30)
    corpus = make_corpus(tmp_path, num_utterances=48)
    source = open_encoder_source(str(run), 0, device="cpu")
    train, dev = (Manifest(corpus).select(split) for split in ("train", "dev"))
    for num_classes in (1, 4):  # 20 frames a class are fewer than 30, and more
        budget, judged = plan_sweep(dev, num_classes, seed=1)
        assert budget == max(30, 20 * num_classes) < train.num_frames.sum() and len(judged) < len(dev)
        keys: dict[str, Any] = {
            "manifest": str(corpus),
            "encoder": str(run),
            "fit_split": "train",
            "split": "dev",
            "seed": 1,
        }
        out = tmp_path / f"layers{num_classes}"
        summary = measure(MeasureConfig(**keys, layers="all", num_classes=num_classes, out=str(out)))
        assert summary["utterances"] == len(judged) and summary["judged_utterances"] <= len(judged)
        chosen = choose_layer(Manifest(corpus), "train", "dev", source, num_classes, seed=1)
        assert chosen == {key: read_choice(out)[key] for key in ("layer", "chosen_by", "sweep")}


def test_the_recommendation_is_the_best_layer_and_cluster_would_choose_the_same(
    corpus: Path, run: Path, sweep: Path
) -> None:
    meta, choice = read_meta(sweep, "layer-sweep"), read_choice(sweep)
    layers = read_summary(sweep)["layers"]
    best = max(("1", "2"), key=lambda layer: layers[layer]["pnmi"])
    assert choice["layer"] == int(best) and choice["chosen_by"] == "highest PNMI on 'dev'"
    assert choice["sweep"] == {layer: measures["pnmi"] for layer, measures in layers.items()}
    source = open_encoder_source(str(run), 0, device="cpu")
    assert (choice["encoder"], choice["convention"]) == (source.fingerprint, "residual") and meta["parents"][
        "encoder"
    ] == source.fingerprint
    chosen = choose_layer(Manifest(corpus), "train", "dev", source, num_classes=8, seed=0)
    assert chosen == {key: choice[key] for key in ("layer", "chosen_by", "sweep")}


def test_the_folder_has_the_numbers_and_a_plot_and_nothing_else(sweep: Path) -> None:
    assert sorted(path.name for path in sweep.iterdir()) == ["layers.svg", "meta.json", "summary.json"]
    svg = (sweep / "layers.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and "</svg>" in svg and "<script" not in svg


def test_the_terminal_gets_a_row_a_layer(sweep: Path) -> None:
    summary = read_summary(sweep)
    lines = as_text(summary).splitlines()
    assert lines[0].split()[:2] == ["layer", "PNMI"] and len(lines) == 5
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[int(summary["layer"]) + 1].split()[1] == "*" and lines[4].startswith(
        f"* layer {summary['layer']}: highest PNMI"
    )


def test_a_list_of_layers_is_swept_alone_and_a_layer_that_is_not_there_is_an_error(
    corpus: Path, run: Path, sweep: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "encoder": str(run),
        "split": "dev",
        "fit_split": "train",
        "num_classes": 8,
    }
    summary = measure(MeasureConfig(**keys, layers=[1, 0, 1], out=str(tmp_path / "some")))
    everything = read_summary(sweep)["layers"]
    assert summary["layers"] == {layer: everything[layer] for layer in ("0", "1")} and summary["layer"] == 1
    with pytest.raises(ValueError, match="layers: 7 does not exist; .* has layers 0 to 2"):
        measure(MeasureConfig(**keys, layers=[1, 7], out=str(tmp_path / "none")))


def test_without_alignments_the_middle_layer_is_recommended_and_nothing_is_pretended(
    make_corpus: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    manifest = make_corpus(tmp_path, phones=False, num_utterances=6)
    summary = measure(
        MeasureConfig(
            manifest=str(manifest),
            encoder=str(run),
            layers="all",
            num_classes=4,
            out=str(tmp_path / "layers"),
        )
    )
    assert summary["layer"] == 1 and "the middle one: 1 of 2" in summary["chosen_by"]
    assert all(set(measures) == {"usage", "perplexity"} for measures in summary["layers"].values())
    assert read_choice(tmp_path / "layers")["sweep"] == {}
    assert any("phone" in note for note in summary["notes"])


def test_layer_zero_is_recommended_only_where_it_stands_alone() -> None:
    scores = {0: {"pnmi": 0.9}, 1: {"pnmi": 0.2}, 2: {"pnmi": 0.3}}
    assert recommend([0, 1, 2], scores, "dev")["layer"] == 2
    assert recommend([0], scores, None) == {
        "layer": 0,
        "chosen_by": "highest PNMI on the whole corpus",
        "sweep": {"0": 0.9},
    }
    assert recommend(range(13), {}, "dev")["layer"] == 6 and recommend([9, 6, 7], {}, None)["layer"] == 7


def test_drawn_utterances_are_whole_aligned_and_about_as_many_as_asked(corpus: Path) -> None:
    rows = Manifest(corpus)
    drawn = draw_utterances(rows, 200, seed=0)
    assert drawn == draw_utterances(rows, 200, seed=0) != draw_utterances(rows, 200, seed=1)
    assert 150 <= sum(utterance.num_frames for utterance in drawn) <= 200 + max(rows.num_frames)
    assert len(draw_utterances(rows, 10**6, seed=0)) == len(rows)


def test_the_frames_of_a_sweep_leave_no_file_and_a_full_disk_is_an_error_that_says_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = frame_file(tmp_path / "partial", (2, 3, 4))
    array[:] = 7
    assert array.sum() == 7 * 24 and not list((tmp_path / "partial").iterdir())

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match="need 96 bytes of disk for a while .*No space left"):
        frame_file(tmp_path / "partial", (2, 3, 4))
    monkeypatch.delattr("os.posix_fallocate")  # as on macOS
    assert frame_file(tmp_path / "partial", (2, 3, 4)).shape == (2, 3, 4)


def test_another_artefact_is_no_sweep(corpus: Path) -> None:
    with pytest.raises(ValueError, match="a 'layer-sweep' is needed here"):
        read_choice(corpus)
