from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantize.codebook import Codebook, write_codebook


def written(folder: Path, centroids: np.ndarray, mean: np.ndarray) -> Codebook:
    fingerprint = write_codebook(
        folder, centroids, mean, {"kind": "mfcc", "cmvn": False}, {"inertia": 1.0}, {}, {"manifest": "m"}
    )
    codebook = Codebook.open(folder)
    assert codebook.fingerprint == fingerprint
    return codebook


def test_a_codebook_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centroids, mean = (
        rng.standard_normal((1, 10, 4)).astype(np.float32),
        rng.standard_normal(4).astype(np.float32),
    )
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


def test_decoding_adds_the_mean_and_the_centroids_of_every_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centroids, mean = (
        rng.standard_normal((3, 7, 5)).astype(np.float32),
        rng.standard_normal(5).astype(np.float32),
    )
    codebook = written(tmp_path / "codebook", centroids, mean)
    labels = rng.integers(7, size=(20, 3)).astype(np.uint16)
    for num_levels in (1, 2, 3):
        slow = [
            mean.astype(np.float64) + sum(centroids[level, row[level]] for level in range(num_levels))
            for row in labels
        ]
        decoded = codebook.decode(labels[:, :num_levels])
        assert decoded.dtype == np.float32 and decoded.shape == (20, 5)
        np.testing.assert_allclose(decoded, slow, atol=2e-6)  # three float32 additions of numbers below 4
    assert np.array_equal(codebook.decode(labels[:, 0]), codebook.decode(labels[:, :1]))
    assert (
        codebook.decode(np.empty(0, np.uint16)).shape
        == codebook.decode(np.empty((0, 3), np.uint16)).shape
        == (0, 5)
    )


def test_what_is_assigned_decodes_to_the_nearest_centroid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codebook = written(
        tmp_path / "codebook", rng.standard_normal((1, 9, 4)).astype(np.float32), np.full(4, 2.0, np.float32)
    )
    features = codebook.decode(np.arange(9)) + 1e-3 * rng.standard_normal((9, 4)).astype(np.float32)
    assert codebook.assign(features).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 3]), "labels are 0 to 2, not 0 to 3"),
        (np.array([[0, 1], [-1, 1]]), "labels are 0 to 2, not -1 to 1"),
        (
            np.zeros((5, 3), np.uint16),
            r"has 2 levels; labels are \(frames,\) or \(frames, levels\), not \(5, 3\)",
        ),
    ],
)
def test_labels_of_another_codebook_are_an_error(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    codebook = written(tmp_path / "codebook", np.zeros((2, 3, 4), np.float32), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=message):
        codebook.decode(labels)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"centroids": np.zeros((1, 3, 4), np.float32)},
            r"'mean' is to be finite float32 \(4,\), and it has none",
        ),
        (
            {"mean": np.zeros(4, np.float32)},
            r"'centroids' is to be finite float32 \(1, 3, 4\), and it has none",
        ),
        ({"centroids": np.zeros((3, 4), np.float32)}, r"'centroids' .*, and it has float32 \(3, 4\)"),
        ({"centroids": np.zeros((1, 3, 4))}, "'centroids' .*, and it has float64"),
        ({"centroids": np.full((1, 3, 4), np.nan, np.float32)}, "'centroids' is to be finite"),
        (
            {"centroids": np.zeros((1, 3, 4), np.float32), "mean": np.zeros(3, np.float32)},
            r"'mean' .* has float32 \(3,\)",
        ),
        (b"\x00" * 5, "centroids.safetensors: missing or damaged"),
        (None, "centroids.safetensors: missing or damaged"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    tensors: dict[str, np.ndarray] | bytes | None, message: str, tmp_path: Path
) -> None:
    written(tmp_path / "codebook", np.zeros((1, 3, 4), np.float32), np.zeros(4, np.float32))
    path = tmp_path / "codebook" / "centroids.safetensors"
    path.unlink()
    if isinstance(tensors, dict):
        save_file(tensors, path)
    elif tensors is not None:
        path.write_bytes(tensors)
    with pytest.raises(ValueError, match=message):
        Codebook.open(tmp_path / "codebook")


def test_features_of_another_dimension_and_nan_are_errors(tmp_path: Path) -> None:
    codebook = written(
        tmp_path / "codebook", np.eye(3, dtype=np.float32)[None], np.zeros(3, dtype=np.float32)
    )
    with pytest.raises(ValueError, match=r"quantises 3-dimensional features, not an array of shape \(5, 4\)"):
        codebook.assign(np.zeros((5, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="NaN or infinity in frame 0"):
        codebook.assign(np.full((2, 3), np.nan, dtype=np.float32))
