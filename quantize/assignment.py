"""The nearest centroid of each frame: FAISS searches, and what float32 cannot tell is decided in float64.

A label is a function of the frame and the centroids: FAISS finds the two nearest centroids of a point in
float32; where the two are closer than float32 can tell, the distances are computed in float64 and the lowest
index wins a tie. Chunks, threads and processors do not matter. FAISS is imported here alone, and works in
threads of this module.
"""

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

# Rows per search, at most MAX_BLOCK. With more, glibc returns the float64 of each block to the system.
BLOCK = 4096
MAX_BLOCK = 8192  # integers below 2^40 of so many rows add up below 2^53, exactly, in float64


def _import_faiss() -> ModuleType:
    """The OpenBLAS in FAISS's wheel takes a processor newer than itself for a 2004 one and runs four times
    too slow.

    It reads OPENBLAS_CORETYPE while it is loaded: name the best kernels the processor has (65 → 258 GFLOP/s
    on a Xeon of 2023).
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
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
_gpu_turn = Lock()  # FAISS's GPU resources serve one thread at a time


@cache
def _num_threads() -> int:
    """As many as OMP_NUM_THREADS says."""
    return int(faiss.omp_get_max_threads())


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads of our own, each with FAISS on one: a second OpenMP team spinning beside torch's costs up to
    ten times the search."""
    return ThreadPoolExecutor(_num_threads(), "faiss", initializer=faiss.omp_set_num_threads, initargs=(1,))


@cache
def _gpu() -> Any:
    return faiss.StandardGpuResources()


def over_blocks(function: Callable[[slice], R], num_rows: int, block: int | None = None) -> Iterator[R]:
    """`function` of every block of rows, computed in parallel, in order; never more than two results a thread
    lie waiting."""
    pending: deque[Future[R]] = deque()
    size = block or BLOCK
    for start in range(0, num_rows, size):
        pending.append(_threads().submit(function, slice(start, min(start + size, num_rows))))
        if len(pending) > 2 * _num_threads():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def nearest(points: np.ndarray, centroids: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """The nearest row of `centroids` (K, dim) for each of `points` (n, dim), after `mean` is taken off: (n,)
    int64.

    Equals the argmin of float64 distances, the lowest index of equals. NaN or infinity in `points` is a
    ValueError.
    """
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    found = over_blocks(
        lambda part: nearest_in_block(_centred(points[part], mean), centroids, part.start), len(points)
    )
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _centred(block: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    return np.ascontiguousarray(block if mean is None else block - mean, dtype=np.float32)


def nearest_in_block(block: np.ndarray, centroids: np.ndarray, first_row: int) -> np.ndarray:
    """`nearest` of one block of rows, float32 and contiguous, in this thread; `first_row` is its place, for
    the message."""
    norms = np.sqrt(np.einsum("nd,nd->n", block, block))
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        what = (
            "values whose squares float32 cannot hold" if np.isfinite(block[row]).all() else "NaN or infinity"
        )
        raise ValueError(f"features: {what} in frame {first_row + row}")
    if len(centroids) == 1:
        return np.zeros(len(block), dtype=np.int64)
    if faiss.get_num_gpus():
        with _gpu_turn:
            distances, indices = faiss.knn_gpu(_gpu(), block, centroids, 2)
    else:
        distances, indices = faiss.knn(block, centroids, 2)  # (rows, 2), ascending
    # Rounding of |x|² + |c|² - 2x·c in float32: at most dim roundings each of half an ulp; eight standard
    # deviations of their random walk where that is less. Relative to (|x| + |c|)², and |c| ≤ |x| + d for any
    # centroid that can win.
    dim = block.shape[1]
    unit = (min(dim, 8 * dim**0.5) + 8) * 2.0**-24
    # the last: squares too small for float32
    error = unit * (2 * norms + np.sqrt(np.maximum(distances[:, 0], 0))) ** 2 + dim * 2.0**-148
    labels: np.ndarray = indices[:, 0].astype(np.int64)
    unsure = np.flatnonzero(distances[:, 1] - distances[:, 0] <= 2 * error)
    # every centroid may be a candidate of every row: some 128 MB a thread, or one row
    step = max(1, 2**22 // centroids.size)
    for start in range(0, len(unsure), step):
        rows = unsure[start : start + step]
        labels[rows] = _resolve(block[rows], centroids, error[rows])
    return labels


def _resolve(points: np.ndarray, centroids: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Labels of points between centroids: all that float32 cannot exclude are compared in float64."""
    rough = squared_distances(points, centroids, slice(None))  # (rows, K), squared
    row, candidate = np.nonzero(rough <= rough.min(axis=1, keepdims=True) + 2 * error[:, None])
    distances = ((points[row].astype(np.float64) - centroids[candidate]) ** 2).sum(axis=1)
    order = np.lexsort((candidate, distances, row))
    _, first = np.unique(row[order], return_index=True)
    labels: np.ndarray = candidate[order[first]]
    return labels


def squared_distances(points: np.ndarray, others: np.ndarray, part: slice) -> np.ndarray:
    """Of each row in `part` of `points` to each of `others`, float32 (rows, others)."""
    distances: np.ndarray = faiss.pairwise_distances(points[part], others)
    return distances
