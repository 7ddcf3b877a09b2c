"""Floors for unit language models: interpolated Kneser-Ney n-grams (Chen & Goodman, 1999, §2.7) over the same
predictions.

A sequence is BOS, units, EOS with BOS = K and EOS = K + 1; the K units and EOS are predicted, BOS never is.
Discounts, one per order, are fitted on a tenth of the training documents with counts from the other nine,
then the counts are taken from all of them: held-out data decide nothing. Orders 1, 2 and 3 are the unigram,
bigram and trigram floors. Sequences of which the length is known beforehand (the upper levels of residual
units) have no EOS; then it is no outcome either.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

DISCOUNTS = np.linspace(0.02, 0.98, 25)
KEYS_AT_ONCE = 2**20


class _Level(NamedTuple):
    """Counts of one order: n-grams and their (n-1)-word histories, as sorted base-V numbers."""

    grams: np.ndarray
    counts: np.ndarray
    histories: np.ndarray
    totals: np.ndarray  # sum of counts that follow each history
    types: np.ndarray  # how many different words follow each history


class Ngram:
    """An n-gram model of unit sequences.

    >>> model = Ngram.fit([np.array([2, 0, 1, 0, 1, 3])] * 20, num_units=2, order=2)
    >>> model.log_probabilities(np.array([2, 0, 1, 3])).shape     # of 0, 1 and EOS, in nats
    (3,)
    """

    def __init__(
        self,
        sequences: Iterable[np.ndarray],
        num_units: int,
        order: int,
        discounts: np.ndarray | None = None,
        ends: bool = True,
    ):
        """Count `sequences`, which have an EOS if `ends`; `discounts` (order,) from the unigram up, 0.5 where
        not given."""
        self.num_units, self.order = num_units, order
        self.num_outcomes = num_units + ends
        self.size = num_units + 2
        if self.size**order >= 2**63:
            raise ValueError(f"{order}-grams over {num_units} units do not fit 64-bit keys; lower the order")
        self.discounts = np.full(order, 0.5) if discounts is None else discounts
        keys, counts = self._count(sequences)
        self.levels: list[_Level] = []
        for n in range(order, 0, -1):
            self.levels.insert(0, self._level(keys, counts))
            if n > 1:
                keys, counts = self._lower(keys, counts, n - 1)

    @classmethod
    def fit(cls, sequences: Sequence[np.ndarray], num_units: int, order: int, ends: bool = True) -> "Ngram":
        """Counts from all `sequences`, discounts from every tenth (at most 1000 of them) against counts of
        the others."""
        parts = sequences if len(sequences) > 1 else np.array_split(sequences[0], 2)
        held_out = set(range(9, len(parts), 10)[:1000]) or {len(parts) - 1}
        partial = cls((parts[i] for i in range(len(parts)) if i not in held_out), num_units, order, ends=ends)
        statistics = partial._statistics(np.concatenate([partial._keys(parts[i]) for i in sorted(held_out)]))
        discounts = np.full(order, 0.5)
        for _ in range(2):  # coordinate descent: twice round the orders
            for n in range(order):
                losses = []
                for discounts[n] in DISCOUNTS:
                    losses.append(-np.log(_interpolate(statistics, discounts, partial.num_outcomes)).sum())
                discounts[n] = DISCOUNTS[int(np.argmin(losses))]
        return cls(sequences, num_units, order, discounts, ends)

    def log_probabilities(self, sequence: np.ndarray) -> np.ndarray:
        """Natural log probability of each symbol of `sequence` after its first, float64 (len - 1,)."""
        probabilities = _interpolate(
            self._statistics(self._keys(sequence)), self.discounts, self.num_outcomes
        )
        return np.asarray(np.log(probabilities))

    def log_likelihoods(
        self, sequences: Iterable[np.ndarray], scored: np.ndarray | None = None
    ) -> np.ndarray:
        """Natural log likelihood of each sequence, float64 (sequences,); many are looked up at once.

        `scored` (num_units + 2,) bool tells which symbols count, by default all do. Sums are exactly rounded
        (`math.fsum`), so that the same symbols in another order have the very same unigram score.
        """
        sums: list[float] = []
        for keys in _batches(map(self._keys, sequences)):
            together = np.concatenate(keys)
            of_symbols = np.log(_interpolate(self._statistics(together), self.discounts, self.num_outcomes))
            if scored is not None:
                of_symbols[~scored[together % self.size]] = 0
            values, at = of_symbols.tolist(), 0
            for size in map(len, keys):
                sums.append(math.fsum(values[at : at + size]))
                at += size
        return np.array(sums)

    def _keys(self, sequence: np.ndarray) -> np.ndarray:
        """The n-gram that ends at each predicted symbol as one number, oldest symbol first; (len - 1,)."""
        padded = np.concatenate([np.full(max(self.order - 2, 0), self.num_units), sequence]).astype(np.int64)
        predicted = len(sequence) - 1
        keys = np.zeros(predicted, np.int64)
        for back in range(self.order - 1, -1, -1):
            keys = keys * self.size + padded[len(padded) - predicted - back : len(padded) - back]
        return keys

    def _count(self, sequences: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The different n-grams, sorted, and how often each occurs. What has been counted is sorted again
        only once as much is new."""
        keys: np.ndarray = np.zeros(0, np.int64)
        counts: np.ndarray = np.zeros(0)
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in _batches(map(self._keys, sequences)):
            waiting.append(np.unique(np.concatenate(batch), return_counts=True))
            if sum(len(new) for new, _ in waiting) >= len(keys):
                keys, counts = _merge([(keys, counts), *waiting])
                waiting = []
        return _merge([(keys, counts), *waiting]) if waiting else (keys, counts)

    def _lower(self, keys: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Kneser-Ney's counts of the next lower order n: in how many contexts a gram occurs; how often, if it
        starts with BOS."""
        lower, inverse = np.unique(keys % self.size**n, return_inverse=True)
        starts = lower // self.size ** (n - 1) == self.num_units
        return lower, np.where(starts, np.bincount(inverse, weights=counts), np.bincount(inverse))

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> _Level:
        histories, inverse, types = np.unique(keys // self.size, return_inverse=True, return_counts=True)
        return _Level(keys, counts, histories, np.bincount(inverse, weights=counts), types)

    def _statistics(self, keys: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per order, unigram first: count of the gram, total and types of its history; 0 where unseen."""
        statistics = []
        for n, level in enumerate(self.levels, start=1):
            grams = keys % self.size**n
            histories = grams // self.size
            totals = _look_up(level.histories, level.totals, histories)
            statistics.append(
                (
                    _look_up(level.grams, level.counts, grams),
                    totals,
                    _look_up(level.histories, level.types, histories),
                )
            )
        return statistics


def _batches(arrays: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Runs of about KEYS_AT_ONCE elements."""
    batch: list[np.ndarray] = []
    size = 0
    for array in arrays:
        batch.append(array)
        size += len(array)
        if size >= KEYS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _merge(tables: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One sorted table of several, the counts of a key added up."""
    keys, inverse = np.unique(np.concatenate([keys for keys, _ in tables]), return_inverse=True)
    return keys, np.bincount(inverse, weights=np.concatenate([counts for _, counts in tables]))


def _interpolate(
    statistics: list[tuple[np.ndarray, np.ndarray, np.ndarray]], discounts: np.ndarray, num_outcomes: int
) -> np.ndarray:
    """p_n(w | h) = max(c(hw) - D_n, 0) / c(h) + D_n types(h) / c(h) p_{n-1}(w | h'), from the uniform
    distribution up."""
    probability = np.full(len(statistics[0][0]), 1 / num_outcomes)
    for (count, total, types), discount in zip(statistics, discounts, strict=True):
        seen = total > 0
        safe = np.where(seen, total, 1.0)
        probability = np.where(
            seen, (np.maximum(count - discount, 0) + discount * types * probability) / safe, probability
        )
    return probability


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0).astype(np.float64)
