"""The codebook artefact: centroids by level, the mean they are relative to, and the feature source they belong to.

`centroids.safetensors` holds `centroids` (levels, K, dim) float32 and `mean` (dim,) float32. Level 0 is relative to the mean,
each further level to what the levels before leave, so that a frame is close to mean + the sum of its centroids.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from pretrain.artefact import atomic_path, commit, read_meta
from pretrain.labels import MAX_CLASSES
from quantize.kmeans import nearest


class Codebook:
    """Read access to a codebook.

    >>> codebook = Codebook.open("runs/demo/codebook1")   # doctest: +SKIP
    >>> codebook.assign(features)                      # (frames, dim) -> uint16 (frames,)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "codebook")
        self.fingerprint: str = self.meta["fingerprint"]
        self.source: dict[str, Any] = self.meta["source"]  # {"kind": "mfcc", ...} or {"kind": "encoder", "encoder": …, "layer": …}
        tensors = load_file(self.folder / "centroids.safetensors")
        self.centroids: np.ndarray = tensors["centroids"]  # (levels, K, dim)
        self.mean: np.ndarray = tensors["mean"]
        self.num_levels, self.num_classes, self.dim = self.centroids.shape

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        return cls(folder)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Nearest centroid of each frame: features (frames, dim) to uint16 (frames,), or (frames, levels) of several levels.

        A pure function of the frame: chunking and threads do not matter, the lowest class wins a tie. Features of another
        dimension, NaN or infinity: ValueError.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"{self.folder}: quantises {self.dim}-dimensional features, not an array of shape {features.shape}")
        levels, residual = [], features - self.mean
        for centroids in self.centroids:
            levels.append(nearest(residual, centroids))
            residual = residual - centroids[levels[-1]]
        return (levels[0] if len(levels) == 1 else np.stack(levels, axis=1)).astype(np.uint16)


def write_codebook(
    folder: str | Path, centroids: np.ndarray, mean: np.ndarray, source: dict[str, Any], fit: dict[str, Any],
    config: dict[str, Any], parents: dict[str, str],
) -> str:  # fmt: skip
    """Write and commit a codebook of `centroids` (levels, K, dim); `fit` holds the statistics of the fit. Returns its fingerprint."""
    levels, num_classes, dim = centroids.shape
    assert num_classes <= MAX_CLASSES and mean.shape == (dim,)
    tensors = {"centroids": np.ascontiguousarray(centroids, dtype=np.float32), "mean": np.asarray(mean, dtype=np.float32)}
    with atomic_path(Path(folder) / "centroids.safetensors") as temporary:
        save_file(tensors, temporary)
    return commit(
        Path(folder), "codebook", config, parents, ["centroids.safetensors"],
        source=source, num_classes=num_classes, num_levels=levels, dim=dim, fit=fit,
    )  # fmt: skip
