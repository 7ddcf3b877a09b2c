"""K-means over frames: FAISS searches, we keep the arithmetic exact.

FAISS finds the two nearest centroids of a point in float32; where the two are closer than float32 can tell, the distances
are computed in float64 and the lowest index wins a tie. Sums and counts are float64. So a label is a function of the frame
and the centroids, whatever the chunk, the thread count or the processor; a seed and a sample give one codebook on a machine,
whatever its threads; and a cluster of any size has its true mean.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from pretrain.progress import progress

BLOCK = 8192  # rows per search; fixed, so that sums are added in one order everywhere
SEEDING_POINTS = 32  # k-means++ looks at this many points per class at most


def _import_faiss() -> ModuleType:
    """The OpenBLAS in FAISS's wheel takes a processor newer than itself for a 2004 one and runs four times too slow.

    It reads OPENBLAS_CORETYPE while it is loaded: name the best kernels the processor has (65 → 258 GFLOP/s on a Xeon of 2023).
    """
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        flags = set()
    kernels = {"SKYLAKEX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "HASWELL": {"avx2", "fma"}}
    best = next((core for core, needed in kernels.items() if needed <= flags), None)
    if best is None or "OPENBLAS_CORETYPE" in os.environ:
        return importlib.import_module("faiss")
    os.environ["OPENBLAS_CORETYPE"] = best
    try:
        return importlib.import_module("faiss")
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


faiss = _import_faiss()
R = TypeVar("R")


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads of our own, each with FAISS on one: a second OpenMP team spinning beside torch's costs up to ten times the search.

    As many as OMP_NUM_THREADS says. With a GPU one, as FAISS's GPU resources belong to one thread.
    """
    count = 1 if faiss.get_num_gpus() else faiss.omp_get_max_threads()
    return ThreadPoolExecutor(count, "faiss", initializer=faiss.omp_set_num_threads, initargs=(1,))


@cache
def _gpu() -> Any:
    return faiss.StandardGpuResources()


def over_blocks(function: Callable[[slice], R], num_rows: int) -> Iterator[R]:
    """`function` of every block of rows, computed in parallel, in order. Blocks do not depend on the number of threads."""
    return _threads().map(function, [slice(start, start + BLOCK) for start in range(0, num_rows, BLOCK)])


def nearest(points: np.ndarray, centroids: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """The nearest row of `centroids` (K, dim) for each of `points` (n, dim), after `mean` is taken off: (n,) int64.

    Equals the argmin of float64 distances, the lowest index of equals. NaN or infinity in `points` is a ValueError.
    """
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    found = over_blocks(lambda part: _nearest(_centred(points[part], mean), centroids, part.start), len(points))
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _centred(block: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    return np.ascontiguousarray(block if mean is None else block - mean, dtype=np.float32)


def _nearest(block: np.ndarray, centroids: np.ndarray, first_row: int) -> np.ndarray:
    norms = np.sqrt(np.einsum("nd,nd->n", block, block))
    if not np.isfinite(norms).all():
        raise ValueError(f"features: NaN or infinity in frame {first_row + int(np.flatnonzero(~np.isfinite(norms))[0])}")
    if len(centroids) == 1:
        return np.zeros(len(block), dtype=np.int64)
    if faiss.get_num_gpus():
        distances, indices = faiss.knn_gpu(_gpu(), block, centroids, 2)
    else:
        distances, indices = faiss.knn(block, centroids, 2)  # (rows, 2), ascending
    # Rounding of |x|² + |c|² - 2x·c in float32: at most dim roundings each of half an ulp; eight standard deviations of
    # their random walk where that is less. Relative to (|x| + |c|)², and |c| ≤ |x| + d for any centroid that can win.
    dim = block.shape[1]
    unit = (min(dim, 8 * dim**0.5) + 8) * 2.0**-24
    error = unit * (2 * norms + np.sqrt(np.maximum(distances[:, 0], 0))) ** 2
    labels: np.ndarray = indices[:, 0].astype(np.int64)
    unsure = np.flatnonzero(distances[:, 1] - distances[:, 0] <= 2 * error)
    step = max(1, 2**24 // centroids.size)  # every centroid may be a candidate of every row: at most 128 MB
    for start in range(0, len(unsure), step):
        rows = unsure[start : start + step]
        labels[rows] = _resolve(block[rows], centroids, error[rows])
    return labels


def _resolve(points: np.ndarray, centroids: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Labels of points between centroids: all that float32 cannot exclude are compared in float64."""
    rough = _distances(points, centroids, slice(None))  # (rows, K), squared
    row, candidate = np.nonzero(rough <= rough.min(axis=1, keepdims=True) + 2 * error[:, None])
    distances = ((points[row].astype(np.float64) - centroids[candidate]) ** 2).sum(axis=1)
    order = np.lexsort((candidate, distances, row))
    _, first = np.unique(row[order], return_index=True)
    labels: np.ndarray = candidate[order[first]]
    return labels


def accumulate(points: np.ndarray, labels: np.ndarray, num_classes: int, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 sums (K, dim) of the centred points of each class, and their counts (K,)."""
    import torch

    def add(part: slice) -> np.ndarray:
        sums = np.zeros((num_classes, points.shape[1]))
        wide = _centred(points[part], mean).astype(np.float64)
        torch.from_numpy(sums).index_add_(0, torch.from_numpy(labels[part]), torch.from_numpy(wide))
        return sums

    sums = np.zeros((num_classes, points.shape[1]))
    for block_sums in over_blocks(add, len(points)):
        sums += block_sums
    return sums, np.bincount(labels, minlength=num_classes).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted codebook level. `centroids` (K, dim) float32 are relative to `mean` (dim,), the mean of the sample."""

    centroids: np.ndarray
    mean: np.ndarray
    inertia: float  # mean squared distance of a point to its centroid
    iterations: int
    empty_reseeded: int  # classes that lost all points on the way and were put elsewhere
    num_empty: int  # classes without a point at the end: more classes than distinct points


def kmeans(
    points: np.ndarray, num_classes: int, *, seed: int = 0, max_iterations: int = 100, tolerance: float = 1e-4, restarts: int = 1
) -> Fit:
    """Lloyd's algorithm from a greedy k-means++ start on `points` (n, dim) float32; the best of `restarts`.

    Stops when inertia falls by less than `tolerance` of itself. An empty class moves to a point drawn in proportion to its
    squared distance. More classes than points, NaN or infinity: ValueError. More classes than distinct points: the rest stay
    empty, counted in `num_empty`.
    """
    if num_classes > len(points):
        raise ValueError(f"num_classes: {num_classes} classes cannot be fitted on {len(points)} frames; take fewer classes")
    points = np.ascontiguousarray(points, dtype=np.float32)
    exact_mean = points.mean(axis=0, dtype=np.float64)
    if not np.isfinite(exact_mean).all():
        raise ValueError(f"features: NaN or infinity in dimension {int(np.flatnonzero(~np.isfinite(exact_mean))[0])} of the sample")
    mean = exact_mean.astype(np.float32)
    blocks = range(0, len(points), BLOCK)
    energy = float(sum(np.sum(np.square(points[start : start + BLOCK] - mean, dtype=np.float64)) for start in blocks))
    fits = []
    with progress(f"k-means {num_classes}", total=max_iterations * restarts, unit="iteration") as advance:
        for restart in range(restarts):
            rng = np.random.default_rng([seed, restart])
            fits.append(_lloyd(points, mean, energy, num_classes, rng, max_iterations, tolerance, advance))
            advance(max_iterations - fits[-1].iterations)
    return min(fits, key=lambda fit: fit.inertia)


def _lloyd(
    points: np.ndarray, mean: np.ndarray, energy: float, num_classes: int, rng: np.random.Generator,
    max_iterations: int, tolerance: float, advance: Any,
) -> Fit:  # fmt: skip
    centroids = seeding(points, mean, num_classes, rng)
    previous, iterations, reseeded = np.inf, 0, 0
    while True:
        labels = nearest(points, centroids, mean)
        sums, counts = accumulate(points, labels, num_classes, mean)
        # Σ|x - c|² from the sums, so that it is as exact and reproducible as they are
        wide = centroids.astype(np.float64)
        inertia = max(0.0, energy - 2 * float((sums * wide).sum()) + float((counts * (wide**2).sum(axis=1)).sum())) / len(points)
        empty = np.flatnonzero(counts == 0)
        settled = previous - inertia <= tolerance * previous if np.isfinite(previous) else inertia == 0
        if iterations == max_iterations or (settled and not len(empty)):
            break
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], wide).astype(np.float32)
        if len(empty):
            drawn = _draw_far(points, mean, centroids, labels, len(empty), rng)
            if settled and not len(drawn):
                break
            moved[empty[: len(drawn)]] = points[drawn] - mean
            reseeded += len(drawn)
        centroids, previous, iterations = moved, inertia, iterations + 1
        advance(1, note=f"inertia {inertia:.4g}")
    return Fit(centroids, mean, inertia, iterations, reseeded, len(empty))


def _draw_far(
    points: np.ndarray, mean: np.ndarray, centroids: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `count` points drawn in proportion to their squared distance to their centroid; none if all lie on theirs."""
    distances = np.empty(len(points))
    for start in range(0, len(points), BLOCK):
        part = slice(start, start + BLOCK)
        distances[part] = np.square(points[part] - mean - centroids[labels[part]], dtype=np.float64).sum(axis=1)
    candidates = np.flatnonzero(distances > 0)
    if not len(candidates):
        return candidates
    weights = distances[candidates] / distances[candidates].sum()
    return rng.choice(candidates, size=min(count, len(candidates)), replace=False, p=weights)


def seeding(points: np.ndarray, mean: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007) on a random part of the points: centroids (K, dim) relative to `mean`.

    Each centroid is the best of 2 + ln K points drawn in proportion to the squared distance to those already chosen.
    """
    count = min(len(points), max(SEEDING_POINTS * num_classes, 10_000))
    part = points[np.sort(rng.choice(len(points), size=count, replace=False))] - mean
    trials = 2 + int(np.log(num_classes))
    chosen = [int(rng.integers(count))]
    distances = np.square(part - part[chosen[0]]).sum(axis=1)
    while len(chosen) < num_classes:
        cumulative = np.cumsum(distances, dtype=np.float64)
        if cumulative[-1] == 0:  # every distinct point is taken
            chosen += rng.integers(count, size=num_classes - len(chosen)).tolist()
            break
        drawn = np.minimum(np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], side="right"), count - 1)
        offered = np.concatenate(list(over_blocks(partial(_distances, part, part[drawn]), count)))
        offered[np.arange(count)[:, None] == drawn] = 0  # a point is no distance from itself, rounding or not
        np.clip(offered, 0, distances[:, None], out=offered)  # (count, trials)
        best = int(offered.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        distances = offered[:, best]
    seeds: np.ndarray = part[chosen]
    return seeds


def _distances(points: np.ndarray, others: np.ndarray, part: slice) -> np.ndarray:
    distances: np.ndarray = faiss.pairwise_distances(points[part], others)
    return distances
