"""The k-means benchmark: what is drawn, what each contender leaves, the oracle, and the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.cluster

from benchmarks import cluster
from benchmarks.measure import Measurement

DESIGN_KEYS = set(
    "name unit ours peer ratio ours_inertia peer_inertia ours_peak_gb peer_peak_gb memory_ratio limit "
    "share_of_limit assignment_tflops "
    "iterations ours_rounds peer_rounds peer_name ratio_fastest peer_variants settings machine "
    "load_before date command".split()
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cluster.draw_points(tmp_path / "points.npy", 1500, 48, seed=0)
    return tmp_path


def settings_of(folder: Path) -> dict[str, Any]:
    return {"points_file": str(folder / "points.npy"), "classes": 12, "seed": 0}


def test_the_drawn_points_come_from_the_seed_alone_and_look_like_features(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        cluster.draw_points(tmp_path / f"{name}.npy", 6000, 48, seed)
    one, same, other = (np.load(tmp_path / f"{name}.npy") for name in ("one", "same", "other"))
    assert one.dtype == np.float32 and one.shape == (6000, 48) and np.isfinite(one).all()
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    mean = one.mean(axis=0, dtype=np.float64)
    centred = one - mean
    assert np.square(mean).sum() > np.square(centred).sum(axis=1).mean()  # far from zero beside the spread
    variances = np.sort(np.linalg.eigvalsh(np.cov(centred.T)))[::-1]
    assert variances[0] > 20 * variances[-1]  # 1 / rank, over 48 ranks
    lengths = np.linalg.norm(centred, axis=1)
    assert lengths.max() > 5 * np.median(lengths)  # heavy tails
    # Silence: many more points near the densest one than a 400th part, which is what a component has on
    # average. (points, 60); 12 of 60 are expected to be silence
    near = np.linalg.norm(one[:, None] - one[None, :60], axis=2) < 3
    assert 0.15 < near.mean(axis=0).max() < 0.3


def test_the_oracle_is_the_mean_of_each_points_smallest_squared_distance() -> None:
    rng = np.random.default_rng(0)
    # float32 would lose half its digits here
    points = (rng.standard_normal((cluster.ROWS + 7, 5)) + 1000).astype(np.float32)
    centroids = points[:9].astype(np.float64)
    expected = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=2).min(axis=1).mean()
    # the same sums in another order
    assert cluster.mean_squared_distance(points, centroids) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ours", *cluster.VARIANTS["sklearn"], *cluster.VARIANTS["faiss"]])
def test_every_contender_leaves_centroids_that_fit_and_ours_the_same_ones_again(
    name: str, folder: Path
) -> None:
    contender = cluster.build(name, settings_of(folder), folder)
    points = np.load(folder / "points.npy")
    spread = cluster.mean_squared_distance(points, points.mean(axis=0, keepdims=True))
    for _ in range(2):
        contender.run()
    centroids = np.load(folder / f"{name}.npy")
    assert centroids.shape == (
        12,
        48,
    )  # in the points' own coordinates: relative to the mean they would lie far away
    assert cluster.mean_squared_distance(points, centroids) < 0.75 * spread
    found = cluster.figures(name, [Measurement([0.5, 0.25], 1.5, {})], points, folder)
    assert found["rounds"] == [2.0, 4.0] and found["seconds"] == 3.0 and found["peak_gb"] == 1.5
    # peers add in any order
    assert found["iterations"] >= 1 and found["distinct_codebooks"] in ({1} if name == "ours" else {1, 2})


def test_our_own_inertia_is_the_oracles(folder: Path) -> None:
    cluster.build("ours", settings_of(folder), folder).run()
    claimed = json.loads((folder / "ours.jsonl").read_text())["claimed_inertia"]
    # ours rounds rows to integers far below float32's last bit
    assert claimed == pytest.approx(
        cluster.mean_squared_distance(np.load(folder / "points.npy"), np.load(folder / "ours.npy")), rel=1e-6
    )


def test_the_peers_settings_are_the_published_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = sklearn.cluster.MiniBatchKMeans
    monkeypatch.setattr(
        sklearn.cluster, "MiniBatchKMeans", lambda **given: used.append(given) or real(**given)
    )
    for name in cluster.VARIANTS["sklearn"]:
        cluster.build(name, settings_of(folder), folder).run()
    # fairseq examples/hubert/simple_kmeans/learn_kmeans.py
    published = {
        "init": "k-means++",
        "max_iter": 100,
        "batch_size": 10000,
        "tol": 0.0,
        "max_no_improvement": 100,
        "n_init": 20,
        "reassignment_ratio": 0.0,
        "compute_labels": False,
    }
    assert used[0] == published | {"n_clusters": 12, "random_state": 0}
    assert used[1] == used[0] | {"n_init": 1}


def test_assignment_counts_the_products_of_every_point_with_every_centroid(folder: Path) -> None:
    cluster.build("ours", settings_of(folder), folder).run()
    assignment = cluster.build("assignment", settings_of(folder), folder)
    assignment.run()
    assert assignment.amount == 2 * 1500 * 48 * 12


def test_the_headline_is_against_the_published_setting_and_the_fastest_stands_beside_it() -> None:
    fit = {"rounds": [1.0], "peak_gb": 2.0, "iterations": 3, "distinct_codebooks": 1}
    found = {
        "ours": {**fit, "seconds": 2.0, "inertia": 5.0},
        "published": {**fit, "seconds": 40.0, "inertia": 6.0, "peak_gb": 3.0},
        "cheap": {**fit, "seconds": 8.0, "inertia": 7.0},
        "assignment": {"rate": 3e11},
        "gemm": {"rate": 4e11},
    }
    sides = cluster.sides(found, ["published", "cheap"])
    assert (sides["ours"], sides["peer"], sides["ratio"]) == (2.0, 40.0, 20.0)
    assert (sides["peer_name"], sides["peer_name_fastest"], sides["ratio_fastest"]) == (
        "published",
        "cheap",
        4.0,
    )
    assert (sides["ours_inertia"], sides["peer_inertia"], sides["memory_ratio"]) == (5.0, 6.0, 1.5)
    assert sides["peer_variants"]["cheap"]["ratio"] == 4.0
    assert (sides["limit"], sides["assignment_tflops"], sides["share_of_limit"]) == (0.4, 0.3, 0.75)
    alone = cluster.sides(found, [])
    assert alone["peer"] is alone["ratio"] is alone["ratio_fastest"] is None and alone["ours"] == 2.0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((20, 3)), "float32 (frames, dim)"),
        (np.zeros(20, np.float32), "float32 (frames, dim)"),
        (np.zeros((4, 3), np.float32), "4 frames are fewer than --classes 5"),
        (np.array([{}]), "cannot be read"),  # a pickle within
    ],
)
def test_features_that_cannot_be_used_are_a_mistake_with_its_remedy(
    array: np.ndarray, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "own.npy", array)
    assert cluster.main(["--features", str(tmp_path / "own.npy"), "--classes", "5"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--points", "3", "--classes", "5"], "--points 3: fewer than --classes 5"),
        (["--peer-rounds", "0"], "--peer-rounds 0: at least 1"),
        (["--features", "nowhere.npy"], "nowhere.npy: cannot be read"),
    ],
)
def test_a_mistake_ends_with_status_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_cluster_ends_with_one_json_line_whose_inertias_are_the_oracles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.draw_points(tmp_path / "own.npy", 3000, 32, seed=3)
    given = [
        "--features",
        str(tmp_path / "own.npy"),
        "--classes",
        "20",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--json",
    ]
    assert cluster.main(given) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result.keys() >= DESIGN_KEYS
    assert result["unit"] == "seconds" and result["ratio"] == result["peer"] / result["ours"] > 0
    assert (
        set(result["peer_variants"]) == set(cluster.VARIANTS["sklearn"])
        and result["peer_name"] == "sklearn-hubert"
    )
    # one before the peers and one after them
    assert len(result["ours_rounds"]) == 2 and len(result["peer_rounds"]) == 1
    assert result["ours_distinct_codebooks"] == 1
    from quantize.kmeans import kmeans

    points = np.load(tmp_path / "own.npy")
    fit = kmeans(points, 20, seed=0)
    assert result["ours_inertia"] == cluster.mean_squared_distance(
        points, fit.centroids[0].astype(np.float64) + fit.mean
    )
    assert result["share_of_limit"] == pytest.approx(result["assignment_tflops"] / result["limit"])
    assert 0 < result["peer_peak_gb"] < 10 and "own.npy" in result["settings"]["points_file"]
    assert str(tmp_path) not in json.dumps(result["settings"])
    assert "sklearn-single" in printed
