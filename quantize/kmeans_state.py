"""The state of k-means: a run of Lloyd's algorithm between two iterations, finished levels, and their
file."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pretrain.store.artefact import disagreements
from pretrain.store.disk import atomic_path
from quantize.rows import Rows


@dataclass(frozen=True, slots=True)
class LevelFit:
    """Statistics of one level."""

    inertia: float  # mean squared distance of a row to its centroid: what the level leaves
    # inertia over the mean squared length of the first level's rows: 1 is nothing explained
    relative_error: float
    iterations: int  # over the whole sample
    converged: bool  # False: stopped by max_iterations
    empty_reseeded: int  # classes that lost all points on the way and were put elsewhere
    num_empty: int  # at the end: more classes than distinct points, or stopped by max_iterations
    largest_share: float  # of the rows, in the largest class
    restart: int = 0  # which of the restarts won


@dataclass(slots=True)
class Run:
    """Lloyd's algorithm between two iterations."""

    centroids: np.ndarray
    rng: np.random.Generator
    inertia: float = math.inf  # of the centroids before
    iterations: int = 0
    reseeded: int = 0


class Unfinished:
    """The state of an interrupted fit: finished levels, the best restart of the next, and a run between two
    iterations.

    One safetensors file holds the centroids of each, `mean`, and the rest as JSON.
    """

    def __init__(self, path: Path | None, plan: dict[str, Any], rows: Rows):
        self.path, self.plan = path, {**plan, "shape": list(rows.points.shape)}
        self.mean, self.variance = rows.mean, rows.variance
        self.levels: list[tuple[np.ndarray, LevelFit]] = []
        self.best: tuple[np.ndarray, LevelFit] | None = None
        self.restart = 0
        self.run: Run | None = None
        self._saved = time.monotonic()
        if path is not None and path.is_file():
            self._load(path)

    def finish_run(self, found: tuple[np.ndarray, LevelFit]) -> None:
        """Adds a finished restart, and its level if it was the last."""
        if self.best is None or found[1].inertia < self.best[1].inertia:
            self.best = (found[0], replace(found[1], restart=self.restart))
        self.run, self.restart = None, self.restart + 1
        if self.restart == self.plan["restarts"]:
            self.levels.append(self.best)
            self.best, self.restart = None, 0
        self.save()

    def save(self, after: float = 0.0) -> None:
        """Writes the state, if there is a file for it and the last was written `after` seconds ago."""
        if self.path is None or time.monotonic() - self._saved < after:
            return
        fits = [*self.levels, *([self.best] if self.best else [])]
        tensors = {f"fit.{number}": centroids for number, (centroids, _) in enumerate(fits)}
        tensors["mean"] = self.mean
        state: dict[str, Any] = {
            "fits": [asdict(fit) for _, fit in fits],
            "levels": len(self.levels),
            "restart": self.restart,
            "variance": self.variance,
        }
        if (run := self.run) is not None:
            tensors["run"] = run.centroids
            state["run"] = {name: getattr(run, name) for name in ("inertia", "iterations", "reseeded")}
            state["rng"] = run.rng.bit_generator.state
        metadata = {"plan": json.dumps(self.plan), "state": json.dumps(state)}
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
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
                run = Run(tensors["run"], np.random.default_rng(), **state["run"])
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
