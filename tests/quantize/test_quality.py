import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from pretrain.artefact import read_meta
from pretrain.audio import phone_frames
from pretrain.labels import commit_labels, write_shard
from pretrain.manifest import Manifest, Utterance, write_manifest
from pretrain.pnmi import JointCounts, entropy_bits, phone_metrics
from quantize.quality import MeasureConfig, deduplicated, measure, rate_metrics, usage_metrics


def write_labels(folder: Path, labels: dict[str, np.ndarray], num_classes: int) -> str:
    write_shard(folder, 0, list(labels), list(labels.values()))
    commit_labels(folder, 1, {}, {}, codebook="codebook", num_classes=num_classes)
    return str(folder)


def random_joint(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    phones = rng.integers(12, size=2000)
    units = np.where(rng.random(2000) < 0.6, phones * 2 + rng.integers(2, size=2000), rng.integers(30, size=2000))
    joint = np.zeros((12, 30), dtype=np.int64)
    np.add.at(joint, (phones, units), 1)
    return phones, units, joint


@pytest.mark.parametrize("seed", range(3))
def test_information_metrics_equal_scikit_learn(seed: int) -> None:
    phones, units, joint = random_joint(seed)
    found = phone_metrics(joint)
    homogeneity, completeness, v_measure = metrics.homogeneity_completeness_v_measure(phones, units)
    shared = metrics.mutual_info_score(phones, units) / np.log(2)
    assert found["pnmi"] == pytest.approx(homogeneity, abs=1e-12)
    assert found["pnmi"] == pytest.approx(shared / entropy_bits(joint.sum(axis=1)), abs=1e-12)
    assert found["completeness"] == pytest.approx(completeness, abs=1e-12)
    assert found["v_measure"] == pytest.approx(v_measure, abs=1e-12)


def test_purities_equal_their_definition_frame_by_frame() -> None:
    phones, units, joint = random_joint(0)
    by_unit = {unit: np.bincount(phones[units == unit]).argmax() for unit in set(units.tolist())}
    by_phone = {phone: np.bincount(units[phones == phone]).argmax() for phone in set(phones.tolist())}
    found = phone_metrics(joint)
    assert found["phone_purity"] == pytest.approx(
        np.mean([by_unit[unit] == phone for phone, unit in zip(phones, units, strict=True)])
    )
    assert found["cluster_purity"] == pytest.approx(
        np.mean([by_phone[phone] == unit for phone, unit in zip(phones, units, strict=True)])
    )


def test_the_limits_are_units_that_are_phones_and_units_that_know_nothing() -> None:
    assert phone_metrics(np.diag([5, 3, 2])) == {
        "pnmi": 1.0, "phone_purity": 1.0, "cluster_purity": 1.0, "completeness": 1.0, "v_measure": 1.0,
    }  # fmt: skip
    blind = phone_metrics(np.outer([4, 4], [3, 3, 3, 3]))
    assert blind["pnmi"] == pytest.approx(0, abs=1e-12) and blind["phone_purity"] == 0.5 and blind["cluster_purity"] == 0.25
    assert phone_metrics(np.array([[7, 0]]))["pnmi"] == 1.0  # one phone: nothing to tell
    assert phone_metrics(np.zeros((0, 4), dtype=np.int64))["phone_purity"] == 0.0


def test_usage_and_perplexity() -> None:
    assert usage_metrics(np.array([5, 5, 5, 5, 0])) == {"usage": 0.8, "perplexity": pytest.approx(4.0)}
    assert usage_metrics(np.array([9, 0]))["perplexity"] == 1.0


def test_runs_collapse_into_units() -> None:
    assert deduplicated(np.array([3, 3, 0, 0, 0, 65535, 3], dtype=np.uint16)).tolist() == [3, 0, 65535, 3]
    assert deduplicated(np.array([0, 0], dtype=np.uint16)).tolist() == [0]
    assert deduplicated(np.array([], dtype=np.uint16)).tolist() == []


def test_the_three_bitrates() -> None:
    counts, units = np.array([50, 50, 0, 0]), np.array([10, 10, 0, 0])  # 100 frames are 2 s
    assert rate_metrics(counts, units, 50.0) == {
        "units_per_second": 10.0, "bitrate_frames": 100.0, "bitrate_units": 20.0, "bitrate_entropy": pytest.approx(10.0),
    }  # fmt: skip


def test_joint_counts_hold_every_frame_of_phone_and_class(corpus: Path) -> None:
    rng, joint = np.random.default_rng(0), JointCounts(5)
    expected: dict[tuple[str, int], int] = {}
    for utterance in Manifest(corpus):
        labels = rng.integers(5, size=utterance.num_frames).astype(np.uint16)
        joint.add(utterance, labels)
        for phone, label in zip(phone_frames(utterance.phones or [], len(labels)).tolist(), labels.tolist(), strict=True):
            expected[phone, label] = expected.get((phone, label), 0) + 1
    phones, matrix = joint.matrix()
    assert phones == sorted(phones)
    assert {(phones[y], z): int(matrix[y, z]) for y, z in zip(*np.nonzero(matrix), strict=True)} == expected


def planted_labels(utterances: list[Utterance], num_frames: int = 0) -> dict[str, np.ndarray]:
    names = ["", "aa", "iy", "sil", "ss"]
    return {
        utterance.id: np.array(
            [names.index(phone) for phone in phone_frames(utterance.phones or [], utterance.num_frames + num_frames)],
            dtype=np.uint16,
        )
        for utterance in utterances
    }


def test_measure_of_labels_that_are_the_phones(corpus: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(corpus))), 8)
    out = tmp_path / "measured"
    summary = measure(MeasureConfig(manifest=str(corpus), labels=labels, split="dev", out=str(out)))
    rows = list(Manifest(corpus).select("dev"))
    assert summary["pnmi"] == summary["pnmi_speech"] == summary["phone_purity"] == summary["v_measure"] == 1.0
    assert summary["frames"] == summary["frames_with_phones"] == sum(utterance.num_frames for utterance in rows)
    assert 0 < summary["silence_share"] < 1 and summary["utterances"] == 3 and summary["bitrate_frames"] == 150.0
    assert json.loads((out / "summary.json").read_text()) == summary
    joint, phones = np.load(out / "joint.npy"), json.loads((out / "phones.json").read_text())
    assert joint.shape == (len(phones), 8) and joint.sum() == summary["frames"]
    meta = read_meta(out, "measurement")
    assert set(meta["files"]) == {"summary.json", "joint.npy", "phones.json"}
    assert meta["parents"]["codebook"] == "codebook"


def test_measure_without_alignments_gives_what_labels_alone_can_tell(corpus: Path, tmp_path: Path) -> None:
    utterances = list(Manifest(corpus))
    rows = [{"id": u.id, "path": u.path, "start": 0, "num_samples": u.num_samples, "sample_rate": 16000} for u in utterances]
    write_manifest(tmp_path / "manifest", rows, {}, {})
    labels = write_labels(tmp_path / "labels", planted_labels(utterances), 8)
    summary = measure(MeasureConfig(manifest=str(tmp_path / "manifest"), labels=labels, out=str(tmp_path / "measured")))
    assert "pnmi" not in summary and 0 < summary["usage"] <= 5 / 8
    assert {"perplexity", "units_per_second", "bitrate_frames", "bitrate_units", "bitrate_entropy"} <= set(summary)
    assert np.load(tmp_path / "measured" / "joint.npy").shape == (0, 8)


def test_one_frame_of_difference_is_allowed_and_two_are_not(corpus: Path, tmp_path: Path) -> None:
    utterances = list(Manifest(corpus))
    for extra in (-1, 1):
        labels = write_labels(tmp_path / f"labels{extra}", planted_labels(utterances, extra), 8)
        assert measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / f"measured{extra}")))["pnmi"] == 1.0
    labels = write_labels(tmp_path / "labels2", planted_labels(utterances, 2), 8)
    frames = utterances[0].num_frames
    with pytest.raises(ValueError, match=rf"utterance 'u00' has {frames + 2} labels and {frames} frames"):
        measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / "measured2")))


def test_labels_of_another_corpus_are_an_error_that_names_the_utterance(corpus: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", {"other": np.zeros(10, dtype=np.uint16)}, 8)
    with pytest.raises(ValueError, match="no labels for utterance 'u00'"):
        measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / "measured")))
