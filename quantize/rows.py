"""The sample as k-means reads it: block by block, from an array or a map, with sums that are exact.

A sum is a function of the rows in it: they are rounded to integers (`FixedPoint`) and added as such, so the
order of blocks and threads does not matter, and a class of any size has its true mean.
"""

import math

import numpy as np

from quantize.assignment import nearest_in_block, over_blocks


class FixedPoint:
    """Values of `num_rows` rows, none above `largest`, as integers: their sums are exact, so the order does
    not matter.

    A value is rounded to a multiple of 2^-40 of the largest, so a mean is off by 2^-41 of it at most: what
    float32 itself rounds off values 2^16 times smaller than the largest. From 2^23 rows on a bit is lost with
    each doubling (2^32 rows: 2^-32), so that totals fit into int64.
    """

    def __init__(self, num_rows: int, largest: float):
        self.bits = min(40, 63 - num_rows.bit_length())
        self.scale = math.ldexp(1.0, self.bits - math.frexp(largest)[1])

    def round(self, block: np.ndarray) -> np.ndarray:
        """Integers as float64, of which `MAX_BLOCK` rows add up exactly."""
        scaled = np.multiply(block, self.scale, dtype=np.float64)
        return np.rint(scaled, out=scaled)


class Rows:
    """The sample as a level of k-means sees it: `rows[part]`, by slice or by indices, is (rows, dim) float32.

    Rows are centred, then less the centroids of the levels above (`descend`), in the float32 arithmetic of
    `Codebook.assign`; spherical ones are centred, then of unit length, or zero. `points` is read when asked
    for and never as a whole. `mean`: the points' own when None. `fixed` holds sums of rows, `energy` is
    Σ|row|², `variance` its mean at the first level.
    """

    def __init__(self, points: np.ndarray, mean: np.ndarray | None = None, spherical: bool = False):
        self.points, self.spherical = points, spherical
        largest = self._largest()
        self.mean = self._mean(largest) if mean is None else mean
        self._above: list[tuple[np.ndarray, np.ndarray]] = []  # centroids and labels of each level above
        self._measure(1.0 if spherical else 2 * largest)
        self.variance = self.energy / len(self)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def dim(self) -> int:
        return int(self.points.shape[1])

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._read(part) - self.mean
        for centroids, labels in self._above:
            rows -= centroids[labels[part]]
        if self.spherical:
            lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
            rows = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return rows

    def descend(self, centroids: np.ndarray) -> None:
        """Be the rows of the next level: what the nearest of `centroids` (K, dim) leaves."""
        labels = np.empty(len(self), dtype=np.min_scalar_type(len(centroids)))

        def label(part: slice) -> None:
            labels[part] = nearest_in_block(self[part], centroids, part.start)

        for _ in over_blocks(label, len(self)):
            pass
        self._above.append((centroids, labels))
        self._measure(self.largest + float(np.abs(centroids).max()))

    def _read(self, part: slice | np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.points[part], dtype=np.float32)

    def _largest(self) -> float:
        """The largest magnitude. NaN, infinity, or values whose squared distances float32 cannot hold:
        ValueError."""

        def by_dimension(part: slice) -> np.ndarray:
            block = self._read(part)
            largest: np.ndarray = np.maximum(block.max(axis=0), -block.min(axis=0))  # NaN stays NaN
            if not np.isfinite(largest).all():
                row, dimension = np.argwhere(~np.isfinite(block))[0]
                raise ValueError(
                    f"features: NaN or infinity in dimension {dimension} of the sample's row "
                    f"{part.start + row}"
                )
            return largest

        largest = np.max(list(over_blocks(by_dimension, len(self))), axis=0)
        if 16 * self.dim * float(largest.max()) ** 2 > float(np.finfo(np.float32).max):
            worst = int(largest.argmax())
            raise ValueError(
                f"features: {largest[worst]:.3g} in dimension {worst}: float32 cannot hold its square; scale "
                "them"
            )
        return float(largest.max())

    def _mean(self, largest: float) -> np.ndarray:
        fixed, total = FixedPoint(len(self), largest), np.zeros(self.dim, dtype=np.int64)
        for sums in over_blocks(lambda part: fixed.round(self._read(part)).sum(axis=0), len(self)):
            total += sums.astype(np.int64)
        return (total / fixed.scale / len(self)).astype(np.float32)

    def _measure(self, bound: float) -> None:
        """`largest`, `fixed` and `energy` of the rows at this level, none above `bound`."""
        bound *= 1 + 2.0**-20  # rounding
        fixed = FixedPoint(len(self), bound**2)

        def add(part: slice) -> tuple[float, np.ndarray, np.ndarray]:
            block = self[part]
            squares = np.square(block, dtype=np.float64) * fixed.scale
            high = np.rint(squares)
            # twice the bits: a square spans twice the range
            low = np.rint((squares - high) * 2.0**fixed.bits)
            return (
                float(np.abs(block).max()),
                high.sum(axis=0).astype(np.int64),
                low.sum(axis=0).astype(np.int64),
            )

        self.largest, energy = 0.0, 0
        for largest, high, low in over_blocks(add, len(self)):
            self.largest = max(self.largest, largest)
            energy += (sum(high.tolist()) << fixed.bits) + sum(low.tolist())
        self.energy = energy / 2**fixed.bits / fixed.scale
        self.fixed = FixedPoint(len(self), self.largest)
