import os
import subprocess
import sys

import numpy as np
import pytest

from quantize import kmeans as module
from quantize.kmeans import Fit, accumulate, kmeans, nearest


def blobs(num_points: int, dim: int, num_blobs: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_blobs, dim)) * 2
    points = centres[rng.integers(num_blobs, size=num_points)] + rng.standard_normal((num_points, dim))
    return (points + offset).astype(np.float32)


def slow_nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    wide = centroids.astype(np.float64)
    return np.array([((point.astype(np.float64) - wide) ** 2).sum(axis=1).argmin() for point in points])


def slow_lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        labels = slow_nearest(points, centroids)
        centroids = np.array([points[labels == k].mean(axis=0) for k in range(len(centroids))])
    return centroids, float(((points - centroids[slow_nearest(points, centroids)]) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize(("dim", "offset"), [(3, 0.0), (39, 20.0), (300, 1000.0)])
def test_nearest_is_the_float64_argmin_whatever_the_offset(dim: int, offset: float) -> None:
    points = blobs(3000, dim, 20, offset=offset)
    centroids = points[:: len(points) // 60]
    assert np.array_equal(nearest(points, centroids), slow_nearest(points, centroids))


def test_the_lowest_index_wins_a_tie() -> None:
    centroids = np.array([[1.0, 0], [-1, 0], [1, 0], [0, 5]], dtype=np.float32)
    points = np.array([[0.0, 0], [2, 0], [-2, 0], [0, -3]], dtype=np.float32)
    assert nearest(points, centroids).tolist() == [0, 0, 1, 0]


def test_labels_do_not_depend_on_the_chunks_they_are_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(5000, 64, 30, offset=20.0)
    rng = np.random.default_rng(1)
    centroids = np.concatenate([points[:40], (points[:20] + points[20:40]) / 2])  # borders with many near ties
    mean = points.mean(axis=0)
    expected = nearest(points, centroids - mean, mean)
    for size in (1, 7, 333):
        starts = np.arange(0, 700, size)
        chunked = np.concatenate([nearest(points[start : start + size], centroids - mean, mean) for start in starts])
        assert np.array_equal(chunked[:700], expected[:700])
    order = rng.permutation(len(points))
    assert np.array_equal(nearest(points[order], centroids - mean, mean), expected[order])
    monkeypatch.setattr(module, "BLOCK", 100)
    assert np.array_equal(nearest(points, centroids - mean, mean), expected)


def test_one_class_takes_everything_and_no_points_have_no_labels() -> None:
    points = blobs(10, 4, 2)
    assert nearest(points, points[:1]).tolist() == [0] * 10
    assert nearest(points[:0], points[:3]).shape == (0,)


def test_sums_of_a_huge_cluster_are_exact() -> None:
    points = np.where(np.arange(2_000_000) % 2, np.float32(3), np.float32(1))[:, None]
    sums, counts = accumulate(points, np.zeros(len(points), dtype=np.int64), 1, np.zeros(1, dtype=np.float32))
    assert (sums.item(), counts.item()) == (4e6, 2e6)
    fit = kmeans(points, 1)
    assert fit.mean.item() + fit.centroids.item() == 2.0
    assert fit.inertia == pytest.approx(1.0, abs=1e-12)


def test_a_huge_cluster_beside_small_ones_keeps_its_true_mean() -> None:
    rng = np.random.default_rng(0)
    silence = rng.uniform(1, 3, (1_000_000, 2)).astype(np.float32)
    points = np.concatenate([silence, blobs(500, 2, 1) + 100, blobs(500, 2, 1) - 100])
    fit = kmeans(points, 3, seed=1)
    centroids = fit.centroids.astype(np.float64) + fit.mean
    closest = centroids[np.abs(centroids - 2).sum(axis=1).argmin()]
    np.testing.assert_allclose(closest, silence.mean(axis=0, dtype=np.float64), atol=1e-6)  # half an ulp of 2 is 1.2e-7


def test_the_fit_is_a_fixed_point_of_slow_float64_lloyd() -> None:
    points = blobs(1500, 8, 12, offset=5.0)
    fit = kmeans(points, 12, tolerance=0.0, max_iterations=200)
    centroids, inertia = slow_lloyd(points, fit.centroids + fit.mean, 1)
    np.testing.assert_allclose(fit.centroids + fit.mean, centroids, atol=1e-5)  # float32 storage of values up to 15
    assert fit.inertia == pytest.approx(inertia, rel=1e-6)
    assert fit.iterations < 200 and fit.empty_reseeded == fit.num_empty == 0


def test_greedy_seeding_finds_separated_blobs() -> None:
    rng = np.random.default_rng(0)
    centres = rng.permutation(np.arange(30))[:, None] * np.array([[10.0, 7.0]])
    points = (centres[rng.integers(30, size=3000)] + 0.1 * rng.standard_normal((3000, 2))).astype(np.float32)
    fit = kmeans(points, 30)
    assert fit.inertia < 0.03  # twice the variance of 0.01: every blob has one centroid


def test_inertia_is_close_to_the_best_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    points = blobs(4000, 16, 40, seed=3)
    peer = KMeans(40, n_init=3, random_state=0).fit(points)
    assert kmeans(points, 40, restarts=3).inertia <= 1.02 * peer.inertia_ / len(points)


def test_restarts_keep_the_best() -> None:
    points = blobs(1000, 4, 25)
    single = [kmeans(points, 25, restarts=count).inertia for count in (1, 4)]
    assert single[1] <= single[0]


def test_nan_and_infinity_are_errors() -> None:
    points = blobs(100, 3, 2)
    for bad in (np.nan, np.inf):
        points[17, 1] = bad
        with pytest.raises(ValueError, match="NaN or infinity in dimension 1"):
            kmeans(points, 2)
        with pytest.raises(ValueError, match="NaN or infinity in frame 17"):
            nearest(points, points[:2])


def test_more_classes_than_frames_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"num_classes: 11 .* 10 frames"):
        kmeans(blobs(10, 3, 2), 11)


def test_fewer_distinct_points_than_classes_are_reported_as_empty_classes() -> None:
    points = np.repeat(blobs(3, 5, 3), 40, axis=0)
    fit = kmeans(points, 7)
    assert fit.num_empty == 4
    assert fit.inertia == pytest.approx(0, abs=1e-9)
    assert len(set(nearest(points, fit.centroids, fit.mean).tolist())) == 3


def test_constant_data_make_one_class() -> None:
    fit = kmeans(np.full((500, 4), 3.25, dtype=np.float32), 5)
    assert (fit.num_empty, fit.inertia, fit.iterations) == (4, 0.0, 0)


def test_an_empty_class_is_reseeded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(600, 4, 6)
    far = np.concatenate([points[:5] - points.mean(axis=0), np.full((1, 4), 1e3, dtype=np.float32)])
    monkeypatch.setattr(module, "seeding", lambda *_: far.astype(np.float32))
    fit = kmeans(points, 6)
    assert fit.empty_reseeded == 1 and fit.num_empty == 0


def test_a_seed_gives_the_same_bits_whatever_the_threads() -> None:
    script = (
        "import hashlib, numpy as np; from quantize.kmeans import kmeans\n"
        "rng = np.random.default_rng(0); points = rng.standard_normal((20000, 40), dtype=np.float32) + 20\n"
        "fit = kmeans(points, 64, seed=5, max_iterations=8)\n"
        "print(hashlib.sha256(fit.centroids.tobytes()).hexdigest(), fit.inertia)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(outputs) == 1


def test_the_seed_decides_the_fit() -> None:
    points = blobs(2000, 6, 50)
    first, again, other = (kmeans(points, 20, seed=seed) for seed in (0, 0, 1))
    assert isinstance(first, Fit)
    assert np.array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, other.centroids)
