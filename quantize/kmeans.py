"""K-means over frames: Lloyd's algorithm, in exact arithmetic, from a k-means++ start.

Labels are exact (`quantize.assignment`) and so are sums (`quantize.rows`); an iteration only moves the rows whose label
changed. So a seed and a sample give one codebook on a machine, byte for byte, whatever its threads; an interrupted fit goes on to
the same one.

The sample may be a map larger than memory: it is read block by block, and beyond a bounded part for the start only the
labels are kept, two bytes a row and level.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pretrain.progress import progress
from pretrain.store.artefact import atomic_path, disagreements
from quantize.assignment import faiss, nearest_in_block, over_blocks, squared_distances
from quantize.rows import Rows

SEEDING_BLOCK = (
    2048  # rows per thread in k-means++; its float32 distances decide, so this is part of the algorithm
)
SEEDING_POINTS = 48  # k-means++ and the first iterations look at this many points per class at most
SEEDING_BYTES = 2 * 10**9  # in so much memory, if that is a point a class at least
SKETCH = 128  # dimensions that k-means++ sees of more
WARM_ITERATIONS, WARM_TOLERANCE = 10, 1e-3  # on those points, before the whole sample is read
SAVE_SECONDS = 20.0  # between states of an unfinished fit


@dataclass(frozen=True, slots=True)
class LevelFit:
    """Statistics of one level."""

    inertia: float  # mean squared distance of a row to its centroid: what the level leaves
    relative_error: (
        float  # inertia over the mean squared length of the first level's rows: 1 is nothing explained
    )
    iterations: int  # over the whole sample
    converged: bool  # False: stopped by max_iterations
    empty_reseeded: int  # classes that lost all points on the way and were put elsewhere
    num_empty: int  # classes without a point at the end: more classes than distinct points, or stopped by max_iterations
    largest_share: float  # of the rows, in the largest class
    restart: int = 0  # which of the restarts won


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted codebook. Centroids of level 0 are relative to `mean`, those of each further level to what is left above it."""

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
    """Lloyd's algorithm from a greedy k-means++ start on `points` (n, dim) float32, an array or a map; the best of `restarts`.

    Stops when inertia falls by less than `tolerance` of itself. An empty class moves to a point drawn in proportion to its
    squared distance. More classes than points, NaN or infinity: ValueError. More classes than distinct points: the rest stay
    empty, counted in `num_empty`.

    `levels`: each further one is fitted in the same way, with `restarts` of its own, on what the levels above leave (residual
    quantisation; Juang & Gray 1982). The first is the same whatever the number of levels.

    `spherical`: by cosine (Dhillon & Modha 2001). Rows are centred and scaled to unit length, centroids too after every
    iteration, so that the nearest centroid of a centred row of any length is the one of the largest cosine. Inertia is that
    of the unit rows. With several levels: ValueError.

    `state`: a file to go on from after an interruption, to the bytes of an uninterrupted fit. Written every 20 s at most and after each
    start, restart and level; the caller removes it. A state of other arguments or points: ValueError.
    """
    options = {
        "num_classes": num_classes,
        "levels": levels,
        "restarts": restarts,
        "max_iterations": max_iterations,
    }
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; at least 1 is needed")
    if num_classes > len(points):
        raise ValueError(
            f"num_classes: {num_classes} classes cannot be fitted on {len(points)} frames; take fewer classes"
        )
    if spherical and levels > 1:
        raise ValueError(
            f"spherical: unit length leaves no residual for {levels} levels; take levels = 1 or spherical = false"
        )
    rows = Rows(points, spherical=spherical)
    work = _Unfinished(state, {**options, "seed": seed, "spherical": spherical, "tolerance": tolerance}, rows)
    total, done = (
        max_iterations * restarts * levels,
        max_iterations * (restarts * len(work.levels) + work.restart),
    )
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
    return Fit(
        np.stack([centroids for centroids, _ in work.levels]), rows.mean, tuple(fit for _, fit in work.levels)
    )


@dataclass(slots=True)
class _Run:
    """Lloyd's algorithm between two iterations."""

    centroids: np.ndarray
    rng: np.random.Generator
    inertia: float = math.inf  # of the centroids before
    iterations: int = 0
    reseeded: int = 0


def _lloyd(
    rows: Rows, run: _Run, max_iterations: int, tolerance: float, report: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, LevelFit]:
    """Centroids (K, dim) and statistics of `run` taken to its end; `report` is called after each iteration."""
    num_classes = len(run.centroids)
    labels = np.full(
        len(rows), num_classes, dtype=np.min_scalar_type(num_classes)
    )  # one more class: of rows not yet seen
    sums, counts = (
        np.zeros((num_classes + 1, rows.dim), dtype=np.int64),
        np.zeros(num_classes + 1, dtype=np.int64),
    )
    while True:
        for classes, more_sums, more_counts in over_blocks(
            partial(_relabel, rows, run.centroids, labels), len(rows)
        ):
            sums[classes] += more_sums
            counts[classes] += more_counts
        members, totals = counts[:-1], sums[:-1] / rows.fixed.scale
        # Σ|x - c|² from the sums, so that it is as exact and reproducible as they are
        wide = run.centroids.astype(np.float64)
        left = rows.energy - 2 * float((totals * wide).sum()) + float((members * (wide**2).sum(axis=1)).sum())
        inertia = max(0.0, left) / len(rows)
        empty = np.flatnonzero(members == 0)
        settled = (
            run.inertia - inertia <= tolerance * run.inertia if math.isfinite(run.inertia) else inertia == 0
        )
        if run.iterations == max_iterations or (settled and not len(empty)):
            break
        weights = np.linalg.norm(totals, axis=1) if rows.spherical else members
        moved = np.where(
            weights[:, None] > 0, totals / np.where(weights > 0, weights, 1)[:, None], wide
        ).astype(np.float32)
        if len(empty):
            drawn = _draw_far(rows, run.centroids, labels, len(empty), run.rng)
            if settled and not len(drawn):
                break
            moved[empty[: len(drawn)]] = rows[drawn]
            run.reseeded += len(drawn)
        run.centroids, run.inertia, run.iterations = moved, inertia, run.iterations + 1
        report()
    return run.centroids, LevelFit(
        inertia,
        inertia / rows.variance if rows.variance else 0.0,
        run.iterations,
        settled,
        run.reseeded,
        len(empty),
        float(members.max() / len(rows)),
    )


def _relabel(
    rows: Rows, centroids: np.ndarray, labels: np.ndarray, part: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label the rows of `part`: the classes that won or lost rows, and what their sums (classes, dim) and counts change by."""
    import torch

    block = rows[part]
    found, before = nearest_in_block(block, centroids, part.start), labels[part].astype(np.int64)
    changed = np.flatnonzero(found != before)
    touched = np.zeros(len(centroids) + 1, dtype=bool)
    touched[found[changed]] = touched[before[changed]] = True
    classes, places = np.flatnonzero(touched), np.cumsum(touched) - 1
    won, lost = places[found[changed]], places[before[changed]]
    values, sums = (
        torch.from_numpy(rows.fixed.round(block[changed])),
        torch.zeros(len(classes), rows.dim, dtype=torch.float64),
    )
    # a class wins or loses a row at most once: at most MAX_BLOCK integers, added exactly
    sums.index_add_(0, torch.from_numpy(won), values).index_add_(0, torch.from_numpy(lost), values, alpha=-1)
    counts = np.bincount(won, minlength=len(classes)) - np.bincount(lost, minlength=len(classes))
    labels[part] = found
    return classes, sums.numpy().astype(np.int64), counts


def _draw_far(
    rows: Rows, centroids: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `count` rows drawn in proportion to their squared distance to their centroid; none if all lie on theirs.

    Weighted sampling without replacement in one pass: the smallest of exponential waiting times (Efraimidis & Spirakis 2006).
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


def _start(rows: Rows, num_classes: int, rng: np.random.Generator) -> _Run:
    """A run before its first iteration: k-means++ and a few iterations on a random part of the rows give its centroids."""
    count = max(SEEDING_POINTS * num_classes, 10_000)
    count = min(len(rows), max(num_classes, min(count, SEEDING_BYTES // (4 * rows.dim))))
    part = rows[np.sort(rng.choice(len(rows), size=count, replace=False))]
    if rows.spherical and part.any():
        part = part[part.any(axis=1)]  # a centroid needs a direction
    run = _Run(seeding(part, num_classes, rng), rng)
    if len(part) == len(rows):
        return run
    few = Rows(part, np.zeros(rows.dim, dtype=np.float32), rows.spherical)
    centroids, _ = _lloyd(few, run, WARM_ITERATIONS, WARM_TOLERANCE)
    return _Run(centroids, rng, reseeded=run.reseeded)


def seeding(points: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): `num_classes` of the points (n, dim), as they are.

    Each is the best of 2 + ln K points drawn in proportion to the squared distance to those already chosen.
    """
    count, trials = len(points), 2 + int(np.log(num_classes))
    looked = _sketch(points, rng) if points.shape[1] > SKETCH else points
    chosen = [int(rng.integers(count))]
    distances = np.square(looked - looked[chosen[0]]).sum(axis=1)
    while len(chosen) < num_classes:
        cumulative = np.cumsum(distances, dtype=np.float64)
        if cumulative[-1] == 0:  # every distinct point is taken
            chosen += rng.integers(count, size=num_classes - len(chosen)).tolist()
            break
        drawn = np.minimum(
            np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], side="right"), count - 1
        )
        offered = np.concatenate(
            list(over_blocks(partial(squared_distances, looked, looked[drawn]), count, SEEDING_BLOCK))
        )
        offered[np.arange(count)[:, None] == drawn] = 0  # a point is no distance from itself, rounding or not
        np.clip(offered, 0, distances[:, None], out=offered)  # (count, trials)
        best = int(offered.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        distances = offered[:, best]
    seeds: np.ndarray = points[chosen]
    return seeds


def _sketch(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, dim) to (n, SKETCH) by random directions: squared distances stay within some 12 % (Johnson & Lindenstrauss 1984).

    For k-means++, which reads every point once a class to draw at random, and is bound by memory.
    """
    transform = faiss.LinearTransform(points.shape[1], SKETCH)
    directions = rng.standard_normal(points.shape[1] * SKETCH, dtype=np.float32) / np.float32(SKETCH**0.5)
    faiss.copy_array_to_vector(directions, transform.A)
    transform.is_trained = True
    return np.concatenate(
        list(over_blocks(lambda part: transform.apply(points[part]), len(points), SEEDING_BLOCK))
    )


def _report(work: "_Unfinished", advance: Callable[..., None]) -> None:
    assert work.run is not None
    advance(1, note=f"inertia {work.run.inertia:.4g}")
    work.save(after=SAVE_SECONDS)


class _Unfinished:
    """What an interrupted fit goes on from: finished levels, the best restart of the next, and a run between two iterations.

    Kept in one safetensors file: the centroids of each, `mean`, and the rest as JSON.
    """

    def __init__(self, path: Path | None, plan: dict[str, Any], rows: Rows):
        self.path, self.plan = path, {**plan, "shape": list(rows.points.shape)}
        self.mean, self.variance = rows.mean, rows.variance
        self.levels: list[tuple[np.ndarray, LevelFit]] = []
        self.best: tuple[np.ndarray, LevelFit] | None = None
        self.restart = 0
        self.run: _Run | None = None
        self._saved = time.monotonic()
        if path is not None and path.is_file():
            self._load(path)

    def finish_run(self, found: tuple[np.ndarray, LevelFit]) -> None:
        """Take a restart into account, and its level if it was the last."""
        if self.best is None or found[1].inertia < self.best[1].inertia:
            self.best = (found[0], replace(found[1], restart=self.restart))
        self.run, self.restart = None, self.restart + 1
        if self.restart == self.plan["restarts"]:
            self.levels.append(self.best)
            self.best, self.restart = None, 0
        self.save()

    def save(self, after: float = 0.0) -> None:
        """Write the state, if there is a file for it and the last was written `after` seconds ago."""
        if self.path is None or time.monotonic() - self._saved < after:
            return
        fits = [*self.levels, *([self.best] if self.best else [])]
        tensors = {f"fit.{number}": centroids for number, (centroids, _) in enumerate(fits)} | {
            "mean": self.mean
        }
        state: dict[str, Any] = {
            "fits": [asdict(fit) for _, fit in fits],
            "levels": len(self.levels),
            "restart": self.restart,
        }
        state["variance"] = self.variance
        if self.run is not None:
            tensors["run"] = self.run.centroids
            state["run"] = {
                "inertia": self.run.inertia,
                "iterations": self.run.iterations,
                "reseeded": self.run.reseeded,
            }
            state["rng"] = self.run.rng.bit_generator.state
        with atomic_path(self.path) as temporary:
            save_file(
                tensors, temporary, metadata={"plan": json.dumps(self.plan), "state": json.dumps(state)}
            )
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                plan, state = (json.loads(file.metadata()[key]) for key in ("plan", "state"))
            variance, mean = state["variance"], tensors["mean"]
            fits = [(tensors[f"fit.{number}"], LevelFit(**fit)) for number, fit in enumerate(state["fits"])]
            num_levels, restart, run = state["levels"], state["restart"], None
            if "run" in state:
                run = _Run(tensors["run"], np.random.default_rng(), **state["run"])
                run.rng.bit_generator.state = state["rng"]
        except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: not the state of a k-means fit ({error}); remove it to start again"
            ) from None
        differing = disagreements(plan, self.plan)
        if not differing and (variance != self.variance or not np.array_equal(mean, self.mean)):
            differing = "points of another mean or variance"
        if differing:
            raise ValueError(
                f"{path}: the state of another k-means fit ({differing}); remove it to start again"
            )
        self.levels, self.restart, self.run = fits[:num_levels], restart, run
        self.best = fits[-1] if len(fits) > num_levels else None
