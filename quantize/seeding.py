"""Greedy k-means++: the points that k-means starts from."""

from functools import partial

import numpy as np

from quantize.assignment import faiss, over_blocks, squared_distances

SEEDING_BLOCK = 2048  # rows per thread; float32 distances of a block decide, so this is part of the algorithm
SKETCH = 128  # dimensions to which points of more are reduced


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
        drawn = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], side="right")
        drawn = np.minimum(drawn, count - 1)
        distances_of = partial(squared_distances, looked, looked[drawn])
        offered = np.concatenate(list(over_blocks(distances_of, count, SEEDING_BLOCK)))
        offered[np.arange(count)[:, None] == drawn] = 0  # a point is no distance from itself, rounding or not
        np.clip(offered, 0, distances[:, None], out=offered)  # (count, trials)
        best = int(offered.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        distances = offered[:, best]
    seeds: np.ndarray = points[chosen]
    return seeds


def _sketch(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, dim) to (n, SKETCH) by random directions, which keeps squared distances within some 12 %.

    Johnson & Lindenstrauss 1984. K-means++ reads every point once per class, and memory bounds its speed.
    """
    transform = faiss.LinearTransform(points.shape[1], SKETCH)
    directions = rng.standard_normal(points.shape[1] * SKETCH, dtype=np.float32) / np.float32(SKETCH**0.5)
    faiss.copy_array_to_vector(directions, transform.A)
    transform.is_trained = True
    parts = over_blocks(lambda part: transform.apply(points[part]), len(points), SEEDING_BLOCK)
    return np.concatenate(list(parts))
