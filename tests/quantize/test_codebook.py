from pathlib import Path

import numpy as np
import pytest

from quantize.codebook import Codebook, write_codebook


def written(folder: Path, centroids: np.ndarray, mean: np.ndarray) -> Codebook:
    fingerprint = write_codebook(folder, centroids, mean, {"kind": "mfcc", "cmvn": False}, {"inertia": 1.0}, {}, {"manifest": "m"})
    codebook = Codebook.open(folder)
    assert codebook.fingerprint == fingerprint
    return codebook


def test_a_codebook_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centroids, mean = rng.standard_normal((1, 10, 4)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    codebook = written(tmp_path / "codebook", centroids, mean)
    assert np.array_equal(codebook.centroids, centroids) and np.array_equal(codebook.mean, mean)
    assert (codebook.num_levels, codebook.num_classes, codebook.dim) == (1, 10, 4)
    assert codebook.source == {"kind": "mfcc", "cmvn": False} and codebook.meta["fit"] == {"inertia": 1.0}


def test_assignment_is_nearest_after_the_mean_is_taken_off(tmp_path: Path) -> None:
    mean = np.array([100.0, 0.0], dtype=np.float32)
    codebook = written(tmp_path / "codebook", np.array([[[1.0, 0], [-1, 0]]], dtype=np.float32), mean)
    labels = codebook.assign(np.array([[102.0, 0], [99, 0], [100, 7]], dtype=np.float32))
    assert labels.dtype == np.uint16 and labels.tolist() == [0, 1, 0]


def test_planted_levels_are_recovered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((8, 6)).astype(np.float32) * 10
    fine = rng.standard_normal((8, 6)).astype(np.float32) * 0.1
    first, second = rng.integers(8, size=(2, 500))
    mean = np.full(6, 3.0, dtype=np.float32)
    codebook = written(tmp_path / "codebook", np.stack([coarse, fine]), mean)
    labels = codebook.assign(mean + coarse[first] + fine[second])
    assert np.array_equal(labels, np.stack([first, second], axis=1))


def test_features_of_another_dimension_and_nan_are_errors(tmp_path: Path) -> None:
    codebook = written(tmp_path / "codebook", np.eye(3, dtype=np.float32)[None], np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match=r"quantises 3-dimensional features, not an array of shape \(5, 4\)"):
        codebook.assign(np.zeros((5, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="NaN or infinity in frame 0"):
        codebook.assign(np.full((2, 3), np.nan, dtype=np.float32))
