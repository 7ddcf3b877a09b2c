"""K-means over frames: Lloyd's algorithm, in exact arithmetic, from a k-means++ start.

Labels are exact (`quantize.assignment`) and so are sums (`quantize.rows`); an iteration only moves the rows
whose label changed. So a seed and a sample give one codebook on a machine, byte for byte, with any number of
threads and after any interruption.

The sample may be a map larger than memory: it is read block by block. Memory holds a bounded part of it for
the start, and the labels, two bytes a row and level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.progress import progress
from quantize.assignment import nearest_in_block, over_blocks
from quantize.kmeans_state import LevelFit, Run, Unfinished
from quantize.rows import Rows
from quantize.seeding import seeding

SEEDING_POINTS = 48  # k-means++ and the first iterations look at this many points per class at most
SEEDING_BYTES = 2 * 10**9  # in so much memory, if that is a point a class at least
WARM_ITERATIONS, WARM_TOLERANCE = 10, 1e-3  # on those points, before the whole sample is read
SAVE_SECONDS = 20.0  # between states of an unfinished fit


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted codebook. Centroids of level 0 are relative to `mean`, those of each further level to what is
    left above it."""

    centroids: np.ndarray  # (levels, K, dim) float32
    mean: np.ndarray  # (dim,) float32, of the sample
    levels: tuple[LevelFit, ...]


def kmeans(
    points: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    levels: int = 1,
    spherical: bool = False,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    restarts: int = 1,
    state: Path | None = None,
) -> Fit:
    """Lloyd's algorithm from a greedy k-means++ start on `points` (n, dim) float32, an array or a map; the
    best of `restarts`.

    Stops when inertia falls by less than `tolerance` of itself. An empty class moves to a point drawn in
    proportion to its squared distance. More classes than points, NaN or infinity: ValueError. More classes
    than distinct points: the rest stay empty, counted in `num_empty`.

    `levels`: each further one is fitted in the same way, with `restarts` of its own, on what the levels above
    leave (residual quantisation; Juang & Gray 1982). The first is the same whatever the number of levels.

    `spherical`: by cosine (Dhillon & Modha 2001). Rows are centred and scaled to unit length, centroids too
    after every iteration, so that the nearest centroid of a centred row of any length is the one of the
    largest cosine. Inertia is that of the unit rows. With several levels: ValueError.

    `state`: a file to go on from after an interruption, to the bytes of an uninterrupted fit. Written every
    20 s at most and after each start, restart and level; the caller removes it. A state of other arguments or
    points: ValueError.
    """
    options = {
        "num_classes": num_classes,
        "levels": levels,
        "restarts": restarts,
        "max_iterations": max_iterations,
    }
    _check(options, len(points), spherical)
    rows = Rows(points, spherical=spherical)
    work = Unfinished(state, {**options, "seed": seed, "spherical": spherical, "tolerance": tolerance}, rows)
    total = max_iterations * restarts * levels
    done = max_iterations * (restarts * len(work.levels) + work.restart)
    with progress(f"k-means {num_classes}", total=total, unit="iteration", done=done) as advance:
        for level in range(levels):
            while len(work.levels) == level:  # until the last of its restarts
                if work.run is None:
                    work.run = _start(rows, num_classes, np.random.default_rng([seed, work.restart, level]))
                    work.save(after=SAVE_SECONDS)
                found = _lloyd(rows, work.run, max_iterations, tolerance, partial(_report, work, advance))
                advance(max_iterations - found[1].iterations)
                work.finish_run(found)
            if level + 1 < levels:
                rows.descend(work.levels[level][0])
    centroids, fits = zip(*work.levels, strict=True)
    return Fit(np.stack(centroids), rows.mean, fits)


def _check(options: dict[str, int], num_frames: int, spherical: bool) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; at least 1 is needed")
    if (wanted := options["num_classes"]) > num_frames:
        raise ValueError(
            f"num_classes: {wanted} classes cannot be fitted on {num_frames} frames; take fewer classes"
        )
    if spherical and options["levels"] > 1:
        raise ValueError(
            f"spherical: unit length leaves no residual for {options['levels']} levels; take levels = 1 or "
            "spherical = false"
        )


def _lloyd(
    rows: Rows, run: Run, max_iterations: int, tolerance: float, report: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, LevelFit]:
    """Centroids (K, dim) and statistics of `run` taken to its end; `report` is called after each
    iteration."""
    num_classes = len(run.centroids)
    # one more class: of unlabelled rows
    labels = np.full(len(rows), num_classes, np.min_scalar_type(num_classes))
    sums, counts = np.zeros((num_classes + 1, rows.dim), np.int64), np.zeros(num_classes + 1, np.int64)
    while True:
        relabel = partial(_relabel, rows, run.centroids, labels)
        for classes, more_sums, more_counts in over_blocks(relabel, len(rows)):
            sums[classes] += more_sums
            counts[classes] += more_counts
        members, totals = counts[:-1], sums[:-1] / rows.fixed.scale
        # Σ|x - c|² from the sums, so that it is as exact and reproducible as they are
        wide = run.centroids.astype(np.float64)
        left = rows.energy - 2 * float((totals * wide).sum()) + float((members * (wide**2).sum(axis=1)).sum())
        inertia = max(0.0, left) / len(rows)
        empty = np.flatnonzero(members == 0)
        first = math.isinf(run.inertia)
        settled = inertia == 0 if first else run.inertia - inertia <= tolerance * run.inertia
        if run.iterations == max_iterations or (settled and not len(empty)):
            break
        weights = np.linalg.norm(totals, axis=1) if rows.spherical else members
        means = totals / np.where(weights > 0, weights, 1)[:, None]
        moved = np.where(weights[:, None] > 0, means, wide).astype(np.float32)
        if len(empty):
            drawn = _draw_far(rows, run.centroids, labels, len(empty), run.rng)
            if settled and not len(drawn):
                break
            moved[empty[: len(drawn)]] = rows[drawn]
            run.reseeded += len(drawn)
        run.centroids, run.inertia, run.iterations = moved, inertia, run.iterations + 1
        report()
    relative, largest = inertia / rows.variance if rows.variance else 0.0, float(members.max() / len(rows))
    fit = LevelFit(inertia, relative, run.iterations, settled, run.reseeded, len(empty), largest)
    return run.centroids, fit


def _relabel(
    rows: Rows, centroids: np.ndarray, labels: np.ndarray, part: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label the rows of `part`: the classes that won or lost rows, and what their sums (classes, dim) and
    counts change by."""
    import torch

    block = rows[part]
    found, before = nearest_in_block(block, centroids, part.start), labels[part].astype(np.int64)
    changed = np.flatnonzero(found != before)
    touched = np.zeros(len(centroids) + 1, dtype=bool)
    touched[found[changed]] = touched[before[changed]] = True
    classes, places = np.flatnonzero(touched), np.cumsum(touched) - 1
    won, lost = places[found[changed]], places[before[changed]]
    values = torch.from_numpy(rows.fixed.round(block[changed]))
    sums = torch.zeros(len(classes), rows.dim, dtype=torch.float64)
    # a class wins or loses a row at most once: at most MAX_BLOCK integers, added exactly
    sums.index_add_(0, torch.from_numpy(won), values).index_add_(0, torch.from_numpy(lost), values, alpha=-1)
    counts = np.bincount(won, minlength=len(classes)) - np.bincount(lost, minlength=len(classes))
    labels[part] = found
    return classes, sums.numpy().astype(np.int64), counts


def _draw_far(
    rows: Rows, centroids: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `count` rows drawn in proportion to their squared distance to their centroid; none if all lie on
    theirs.

    Weighted sampling without replacement in one pass: the smallest of exponential waiting times (Efraimidis &
    Spirakis 2006).
    """

    def distances(part: slice) -> np.ndarray:
        block = rows[part]
        lengths = np.square(block, dtype=np.float64).sum(axis=1)
        squared: np.ndarray = np.square(block - centroids[labels[part]], dtype=np.float64).sum(axis=1)
        squared[squared <= 2.0**-40 * lengths] = 0  # on it, but for the rounding of the centroid
        if rows.spherical:
            squared[lengths == 0] = 0  # no direction to put a centroid in
        return squared

    waiting, drawn, first = np.empty(0), np.empty(0, dtype=np.int64), 0
    for squared in over_blocks(distances, len(rows)):
        some = np.flatnonzero(squared)
        waiting = np.concatenate([waiting, rng.standard_exponential(len(squared))[some] / squared[some]])
        drawn = np.concatenate([drawn, first + some])
        soonest = np.argsort(waiting, kind="stable")[:count]
        waiting, drawn, first = waiting[soonest], drawn[soonest], first + len(squared)
    return drawn


def _start(rows: Rows, num_classes: int, rng: np.random.Generator) -> Run:
    """A run before its first iteration: k-means++ and a few iterations on a random part of the rows give its
    centroids."""
    count = max(SEEDING_POINTS * num_classes, 10_000)
    count = min(len(rows), max(num_classes, min(count, SEEDING_BYTES // (4 * rows.dim))))
    part = rows[np.sort(rng.choice(len(rows), size=count, replace=False))]
    if rows.spherical and part.any():
        part = part[part.any(axis=1)]  # a centroid needs a direction
    run = Run(seeding(part, num_classes, rng), rng)
    if len(part) == len(rows):
        return run
    few = Rows(part, np.zeros(rows.dim, dtype=np.float32), rows.spherical)
    centroids, _ = _lloyd(few, run, WARM_ITERATIONS, WARM_TOLERANCE)
    return Run(centroids, rng, reseeded=run.reseeded)


def _report(work: Unfinished, advance: Callable[..., None]) -> None:
    assert work.run is not None
    advance(1, note=f"inertia {work.run.inertia:.4g}")
    work.save(after=SAVE_SECONDS)
