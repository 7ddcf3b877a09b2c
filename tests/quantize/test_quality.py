from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from pretrain.data.manifest import Manifest
from pretrain.data.utterance import phone_frames
from pretrain.objectives.pnmi import JointCounts, entropy_bits, phone_metrics
from quantize.quality import (
    deduplicated,
    level_metrics,
    measures_text,
    rate_metrics,
    table_groups,
    usage_metrics,
)


def random_joint(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    phones = rng.integers(12, size=2000)
    units = np.where(
        rng.random(2000) < 0.6, phones * 2 + rng.integers(2, size=2000), rng.integers(30, size=2000)
    )
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
        "pnmi": 1.0,
        "phone_purity": 1.0,
        "cluster_purity": 1.0,
        "completeness": 1.0,
        "v_measure": 1.0,
    }
    blind = phone_metrics(np.outer([4, 4], [3, 3, 3, 3]))
    assert (
        blind["pnmi"] == pytest.approx(0, abs=1e-12)
        and blind["phone_purity"] == 0.5
        and blind["cluster_purity"] == 0.25
    )
    assert phone_metrics(np.array([[7, 0]]))["pnmi"] == 1.0  # one phone: nothing to tell
    assert phone_metrics(np.zeros((0, 4), dtype=np.int64))["phone_purity"] == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_rounding_takes_no_share_beyond_one(seed: int) -> None:
    found = phone_metrics(np.diag(np.random.default_rng(seed).integers(1, 100, 9)))
    assert max(found.values()) <= 1.0 and found["pnmi"] == pytest.approx(1.0)


def test_usage_and_perplexity() -> None:
    assert usage_metrics(np.array([5, 5, 5, 5, 0])) == {"usage": 0.8, "perplexity": pytest.approx(4.0)}
    assert usage_metrics(np.array([9, 0]))["perplexity"] == 1.0


def test_runs_collapse_into_units() -> None:
    assert deduplicated(np.array([3, 3, 0, 0, 0, 65535, 3], dtype=np.uint16)).tolist() == [3, 0, 65535, 3]
    assert deduplicated(np.array([0, 0], dtype=np.uint16)).tolist() == [0]
    assert deduplicated(np.array([], dtype=np.uint16)).tolist() == []
    levels = np.array([[3, 1], [3, 1], [3, 2], [0, 2], [0, 2]], dtype=np.uint16)
    assert deduplicated(levels).tolist() == [[3, 1], [3, 2], [0, 2]]  # a run ends where any level changes


def test_the_three_bitrates() -> None:
    counts, units = np.array([50, 50, 0, 0]), np.array([10, 10, 0, 0])  # 100 frames are 2 s
    assert rate_metrics(counts, units, 50.0) == {
        "units_per_second": 10.0,
        "bitrate_frames": 100.0,
        "bitrate_units": 20.0,
        "bitrate_entropy": pytest.approx(10.0),
    }


def test_joint_counts_hold_every_frame_of_phone_and_class(corpus: Path) -> None:
    rng, joint = np.random.default_rng(0), JointCounts(5)
    expected: dict[tuple[str, int], int] = {}
    for utterance in Manifest(corpus):
        labels = rng.integers(5, size=utterance.num_frames).astype(np.uint16)
        joint.add(utterance, labels)
        for phone, label in zip(
            phone_frames(utterance.phones or [], len(labels)).tolist(), labels.tolist(), strict=True
        ):
            expected[phone, label] = expected.get((phone, label), 0) + 1
    phones, matrix = joint.matrix()
    assert phones == sorted(phones)
    assert {(phones[y], z): int(matrix[y, z]) for y, z in zip(*np.nonzero(matrix), strict=True)} == expected


def test_levels_are_told_of_one_by_one_and_their_bitrate_is_the_sum() -> None:
    counts = np.array([[50, 50, 0, 0], [25, 25, 25, 25]])  # 100 frames are 2 s
    found = level_metrics(counts, np.array([[20, 20, 0, 0], [10, 10, 10, 10]]), 50.0)
    assert found == {
        "usage_by_level": [0.5, 1.0],
        "perplexity_by_level": pytest.approx([2.0, 4.0]),
        "bitrate_joint": pytest.approx(20 * (1 + 2)),
    }


def test_a_table_has_a_line_for_each_known_measure_and_a_dash_where_a_column_has_none() -> None:
    columns = {
        "mfcc": {"pnmi": 0.25, "abx_within": 0.1234, "notes": ["x"]},
        "iteration1": {"pnmi": 0.5, "usage_by_level": [1.0, 0.5]},
    }
    assert table_groups(list(columns.values())) == {
        "Phones": [["PNMI", "0.250", "0.500"]],
        "Use": [["classes in use, by level", "–", "100.0%, 50.0%"]],
        "ABX error": [["units, within speaker", "12.34%", "–"]],
    }
    lines = measures_text(columns).splitlines()
    assert lines[0].split() == ["mfcc", "iteration1"] and lines[1] == "Phones"
    assert (
        lines[2].split() == ["PNMI", "0.250", "0.500"]
        and len({len(line) for line in lines if line.startswith("  ")}) == 1
    )
