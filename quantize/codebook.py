"""The codebook artefact: centroids by level, the mean they are relative to, and the feature source they
belong to.

`centroids.safetensors` holds `centroids` (levels, K, dim) float32 and `mean` (dim,) float32. Level 0 is
relative to the mean, each further level to what the levels before leave, so that a frame is close to mean +
the sum of its centroids: `decode`. Of a spherical fit the centroids have length 1: the nearest of them is the
one of the smallest angle, and `decode` gives directions.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pretrain.data.label_shards import MAX_CLASSES
from pretrain.store.artefact import commit, read_meta
from pretrain.store.disk import atomic_path
from quantize.assignment import nearest


class Codebook:
    """Read access to a codebook. A file that is missing, damaged or not what `meta.json` says: ValueError.

    >>> codebook = Codebook.open("runs/demo/codebook1")   # doctest: +SKIP
    >>> labels = codebook.assign(features)   # (frames, dim) -> uint16 (frames,)  # doctest: +SKIP
    >>> codebook.decode(labels)              # the features they stand for, (frames, dim)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder, "codebook")
        self.fingerprint: str = self.meta["fingerprint"]
        # {"kind": "mfcc", ...} or {"kind": "encoder", "encoder": …, "layer": …}
        self.source: dict[str, Any] = self.meta["source"]
        self.num_levels, self.num_classes, self.dim = (
            int(self.meta[name]) for name in ("num_levels", "num_classes", "dim")
        )
        shapes = {"centroids": (self.num_levels, self.num_classes, self.dim), "mean": (self.dim,)}
        tensors = _read_tensors(self.folder / "centroids.safetensors", shapes)
        self.centroids, self.mean = tensors["centroids"], tensors["mean"]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        return cls(folder)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Nearest centroid of each frame: features (frames, dim) to uint16 (frames,), or (frames, levels) of
        several levels.

        A pure function of the frame: chunking and threads do not matter, the lowest class wins a tie.
        Features of another dimension, NaN or infinity: ValueError.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(
                f"{self.folder}: quantises {self.dim}-dimensional features, not an array of shape "
                f"{features.shape}"
            )
        levels, residual = [], features - self.mean
        for centroids in self.centroids:
            levels.append(nearest(residual, centroids))
            residual = residual - centroids[levels[-1]]
        return (levels[0] if len(levels) == 1 else np.stack(levels, axis=1)).astype(np.uint16)

    def decode(self, labels: np.ndarray) -> np.ndarray:
        """The mean plus the centroids of the labels: (frames, dim) float32, the features that `assign` took
        them for.

        Labels are (frames,) of level 0, or (frames, levels) with the first so many levels. More levels than
        the codebook has, or a label beyond its classes: ValueError.
        """
        by_level = labels[None] if labels.ndim == 1 else labels.T  # (levels, frames)
        if labels.ndim > 2 or len(by_level) > self.num_levels:
            raise ValueError(
                f"{self.folder}: has {self.num_levels} levels; labels are (frames,) or (frames, levels), not "
                f"{labels.shape}"
            )
        if by_level.size and not 0 <= by_level.min() <= by_level.max() < self.num_classes:
            raise ValueError(
                f"{self.folder}: labels are 0 to {self.num_classes - 1}, not {int(by_level.min())} to "
                f"{int(by_level.max())}"
            )
        features = np.tile(self.mean, (len(labels), 1))
        for centroids, chosen in zip(self.centroids, by_level, strict=False):
            features += centroids[chosen]
        return features


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The named float32 tensors of these shapes, without NaN and infinity."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); fit the codebook again") from None
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
            has = "it has none" if found is None else f"it has {found.dtype} {found.shape}"
            raise ValueError(
                f"{path}: {name!r} is to be finite float32 {shape}, and {has}; fit the codebook again"
            )
    return tensors


def write_codebook(
    folder: str | Path,
    centroids: np.ndarray,
    mean: np.ndarray,
    source: dict[str, Any],
    fit: dict[str, Any],
    config: dict[str, Any],
    parents: dict[str, str],
) -> str:
    """Write and commit a codebook of `centroids` (levels, K, dim); `fit` holds the statistics of the fit.
    Returns its fingerprint."""
    levels, num_classes, dim = centroids.shape
    assert num_classes <= MAX_CLASSES and mean.shape == (dim,)
    tensors = {
        "centroids": np.ascontiguousarray(centroids, dtype=np.float32),
        "mean": np.asarray(mean, dtype=np.float32),
    }
    with atomic_path(Path(folder) / "centroids.safetensors") as temporary:
        save_file(tensors, temporary)
    return commit(
        Path(folder),
        "codebook",
        config,
        parents,
        ["centroids.safetensors"],
        source=source,
        num_classes=num_classes,
        num_levels=levels,
        dim=dim,
        fit=fit,
    )
