"""Accuracy on minimal pairs and bootstrap confidence intervals.

A pair counts 1 if the positive recording scores higher, 0.5 if both score the same, else 0. Pairs of one item
(the voices that say a word) are averaged, then items are. Intervals are percentile bootstraps over items
(Efron & Tibshirani, 1993, §13.3), seeded: what is drawn again are items, since the voices of an item are no
independent evidence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from units.scores.suites import Pair

CELLS = 2**22  # resampled rows counted at a time: 32 MB
INTERVAL = (2.5, 97.5)


def outcomes(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """1, 0.5 or 0 of each pair, float64; swapping the arguments gives exactly 1 minus it."""
    return np.asarray((positive > negative) + 0.5 * (positive == negative), np.float64)


def bootstrap(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int, seed: int
) -> np.ndarray:
    """95 % interval of a statistic of column sums over rows drawn with replacement: (2,) + the statistic's
    trailing shape.

    `columns` (rows, columns) float64; `statistic` maps sums (draws, columns) to (draws, ...). All columns of
    a draw are of the same rows, so the interval of a difference between columns is a paired one.
    """
    rows = len(columns)
    assert rows > 0
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS // rows)
    sums = []
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        drawn = rng.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
        sums.append(np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows) @ columns)
    return np.asarray(np.percentile(statistic(np.concatenate(sums)), INTERVAL, axis=0))


def item_means(values: np.ndarray, items: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The items, sorted, and the mean of their pairs' values: (pairs, scorers) to (items, scorers)."""
    names, owners, counts = np.unique(np.array(items, dtype=object), return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(owners, weights=column) / counts for column in values.T], axis=1)
    return names.tolist(), means


def accuracies(values: np.ndarray, scorers: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    """Per scorer the mean of `values` (items, scorers) and its 95 % interval: {"lm": {"accuracy": 0.7,
    "ci95": [0.6, 0.8]}}."""
    low, high = bootstrap(values, lambda sums: sums / len(values), draws, seed)
    means = values.mean(0)
    columns = zip(scorers, means.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: {"accuracy": mean, "ci95": [least, most]} for name, mean, least, most in columns}


def summarise(pairs: Sequence[Pair], values: dict[str, np.ndarray], draws: int, seed: int) -> dict[str, Any]:
    """Accuracy of every scorer on all items and on each group of them.

    `values`: outcomes (pairs,) by scorer, the language model's first, under "lm". Returns `num_pairs`,
    `num_items`, `scorers` (see `accuracies`), `over` (the model's accuracy minus each floor's, paired),
    `groups` (by grouping and value: `num_items` and the scorers) and `mean_over_groups` (by grouping: the
    model's mean accuracy over its groups, each counting the same).
    """
    scorers = list(values)
    assert scorers[0] == "lm"
    names, means = item_means(np.stack(list(values.values()), axis=1), [pair.item for pair in pairs])
    low, high = bootstrap(means, lambda sums: (sums[:, :1] - sums) / len(names), draws, seed)
    over = {
        name: {
            "difference": float((means[:, 0] - means[:, i]).mean()),
            "ci95": [float(low[i]), float(high[i])],
        }
        for i, name in enumerate(scorers)
        if i > 0
    }
    of_item = {pair.item: pair.groups for pair in pairs}
    groups: dict[str, dict[str, Any]] = {}
    for grouping in dict.fromkeys(key for pair in pairs for key in pair.groups):
        values_of = np.array([of_item[name].get(grouping, "") for name in names], dtype=object)
        groups[grouping] = {
            value: {"num_items": int(chosen.sum()), **accuracies(means[chosen], scorers, draws, seed)}
            for value in sorted({value for value in values_of.tolist() if value}, key=_natural)
            if (chosen := values_of == value).any()
        }
    return {
        "num_pairs": len(pairs),
        "num_items": len(names),
        "scorers": accuracies(means, scorers, draws, seed),
        "over": over,
        "groups": groups,
        "mean_over_groups": {
            grouping: float(np.mean([of["lm"]["accuracy"] for of in found.values()]))
            for grouping, found in groups.items()
        },
    }


def _natural(value: str) -> tuple[int, str]:
    """Numbers by size before words by name."""
    return (int(value), "") if value.isdecimal() else (2**31, value)
