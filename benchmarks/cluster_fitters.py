"""Contenders of the benchmark cluster: ours, scikit-learn's and FAISS's k-means on the same points."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus

ROWS = 8192  # drawn, hashed or compared at a time


class Fitter:
    """A contender with the points in memory, whose round is one fit."""

    amount = 1.0  # a fit: the rate's inverse is its seconds

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        self.name, self.settings, self.folder = name, settings, folder
        self.points = np.load(settings["points_file"])

    def about(self) -> dict[str, Any]:
        rows = range(0, len(self.points), ROWS)
        return {"inputs_sha256": corpus.digest(self.points[first : first + ROWS] for first in rows)}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        centroids, facts = self.fit()
        # within the round for everybody: two megabytes after seconds of arithmetic
        np.save(self.folder / f"{self.name}.npy", centroids)
        with open(self.folder / f"{self.name}.jsonl", "a") as file:
            file.write(
                json.dumps({"centroids_sha256": hashlib.sha256(centroids.tobytes()).hexdigest(), **facts})
                + "\n"
            )

    def fit(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Centroids (K, dim) in the points' own coordinates, and what to report of this round."""
        raise NotImplementedError


class Ours(Fitter):
    """As the verb `cluster` calls it."""

    def fit(self) -> tuple[np.ndarray, dict[str, Any]]:
        from quantize.kmeans import kmeans

        fit = kmeans(self.points, self.settings["classes"], seed=self.settings["seed"])
        (centroids,), (level,) = fit.centroids, fit.levels
        np.savez(self.folder / "codebook.npz", centroids=centroids, mean=fit.mean)
        return centroids.astype(np.float64) + fit.mean, {
            "iterations": level.iterations,
            "claimed_inertia": level.inertia,
        }


class Assignment(Ours):
    """`nearest` on the centroids that ours has fitted. `amount`: multiplications and additions of x·c
    alone."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        super().__init__(name, settings, folder)
        codebook = np.load(folder / "codebook.npz")
        self.centroids, self.mean = codebook["centroids"], codebook["mean"]
        self.amount = 2.0 * self.points.size * len(self.centroids)

    def run(self) -> None:
        from quantize.assignment import nearest

        nearest(self.points, self.centroids, self.mean)


class Sklearn(Fitter):
    """`learn_kmeans.py` of HuBERT (fairseq): its defaults, and `compute_labels=False` as there. "single": one
    start, not twenty."""

    def fit(self) -> tuple[np.ndarray, dict[str, Any]]:
        from sklearn.cluster import MiniBatchKMeans

        model = MiniBatchKMeans(
            n_clusters=self.settings["classes"],
            init="k-means++",
            batch_size=10000,
            max_iter=100,
            tol=0.0,
            max_no_improvement=100,
            n_init=1 if self.name == "sklearn-single" else 20,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=self.settings["seed"],
        ).fit(self.points)
        return model.cluster_centers_, {"iterations": int(model.n_iter_), "batches": int(model.n_steps_)}


class Faiss(Fitter):
    """FAISS's own loops. "default": as it comes (25 iterations from random points, 256 points a class).
    "matched": k-means++, all points, at most 100 iterations, the same relative change ends it. "super":
    SuperKmeans, which prunes by a statistical bound, on all points. "kernels": with the OpenBLAS kernels that
    ours asks for, where the wheel chooses slower ones."""

    def fit(self) -> tuple[np.ndarray, dict[str, Any]]:
        if self.name.endswith("kernels"):
            from quantize.assignment import faiss
        else:
            import faiss
        dim, classes, seed = self.points.shape[1], self.settings["classes"], self.settings["seed"]
        everything = len(self.points) // classes + 1
        if "default" in self.name:
            model = faiss.Kmeans(dim, classes, seed=seed)
        elif "super" in self.name:
            model = faiss.SuperKmeans(dim, classes, seed=seed, max_points_per_centroid=everything)
        else:
            model = faiss.Kmeans(
                dim,
                classes,
                seed=seed,
                niter=100,
                max_points_per_centroid=everything,
                early_stop_threshold=1e-4,
                init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            )
        model.train(self.points)
        return model.centroids, {"iterations": len(model.obj)}
