import itertools
import math

import numpy as np
import pytest

from units.scores.pairs import accuracies, bootstrap, item_means, outcomes, summarise
from units.scores.suites import Pair


def test_outcomes_are_1_half_and_0_and_swapping_gives_1_minus_them() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 4, (2, 500)).astype(float)  # a quarter are ties
    found = outcomes(positive, negative)
    assert found.tolist() == [
        1.0 if p > n else 0.5 if p == n else 0.0 for p, n in zip(positive, negative, strict=True)
    ]
    np.testing.assert_array_equal(outcomes(negative, positive), 1 - found)
    assert outcomes(negative, positive).mean() == 1 - found.mean()  # halves add up exactly


def test_bootstrap_is_the_percentile_interval_of_resampled_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = np.random.default_rng(1).normal(size=(7, 2)) + 3
    monkeypatch.setattr("units.scores.pairs.CELLS", 7 * 40)  # drawn in three parts
    found = bootstrap(columns, lambda sums: sums[:, 0] / sums[:, 1], 100, seed=5)
    rng, values = np.random.default_rng(5), []
    for count in (40, 40, 20):
        for rows in rng.integers(0, 7, (count, 7)):
            values.append(sum(columns[row, 0] for row in rows) / sum(columns[row, 1] for row in rows))
    np.testing.assert_allclose(found, np.percentile(values, [2.5, 97.5]), rtol=1e-12)  # sums in another order


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = np.random.default_rng(2).normal(size=(2000, 1))
    low, high = bootstrap(values, lambda sums: sums / 2000, 4000, seed=0)[:, 0]
    half = 1.96 * values.std() / math.sqrt(2000)
    # the 2.5 % quantile of 4000 draws has a standard error of 0.042 of the standard error, 2 % of 1.96; four
    # of these
    assert low == pytest.approx(values.mean() - half, abs=0.09 * half) and high == pytest.approx(
        values.mean() + half, abs=0.09 * half
    )


def test_a_difference_of_paired_columns_is_narrower_than_its_columns() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=500)
    columns = np.stack([base + 0.1, base], axis=1)
    low, high = bootstrap(columns, lambda sums: (sums[:, 0] - sums[:, 1]) / 500, 200, seed=0)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_voices_are_averaged_before_items() -> None:
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])[:, None]
    names, means = item_means(values, ["b", "a", "a", "a", "b"])
    assert names == ["a", "b"] and means[:, 0].tolist() == [1 / 3, 1.0]
    assert accuracies(means, ["lm"], 100, 0)["lm"]["accuracy"] == pytest.approx(2 / 3)  # not 3 / 5


def pairs_and_outcomes() -> tuple[list[Pair], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    pairs = [
        Pair(
            f"{kind}{i}",
            f"{kind}{i}{voice}+",
            f"{kind}{i}{voice}-",
            {"type": kind, "length": str(i % 11)},
            "",
        )
        for kind, i, voice in itertools.product("xyz", range(20), "AB")
    ]
    return pairs, {name: rng.choice([0.0, 0.5, 1.0], len(pairs)) for name in ("lm", "length", "bigram")}


def test_a_summary_agrees_with_loops_over_items_and_groups() -> None:
    pairs, values = pairs_and_outcomes()
    told = summarise(pairs, values, 200, 0)
    for name, outcome in values.items():
        by_item: dict[str, list[float]] = {}
        for pair, value in zip(pairs, outcome.tolist(), strict=True):
            by_item.setdefault(pair.item, []).append(value)
        mean = {item: sum(voices) / len(voices) for item, voices in by_item.items()}
        assert told["scorers"][name]["accuracy"] == pytest.approx(sum(mean.values()) / 60)
        for kind in "xyz":
            of_kind = [value for item, value in mean.items() if item.startswith(kind)]
            assert told["groups"]["type"][kind][name]["accuracy"] == pytest.approx(sum(of_kind) / 20)
    assert (
        told["num_pairs"] == 120
        and told["num_items"] == 60
        and told["groups"]["type"]["x"]["num_items"] == 20
    )
    assert list(told["groups"]["length"]) == [str(i) for i in range(11)]  # 10 after 9
    by_type = [told["groups"]["type"][kind]["lm"]["accuracy"] for kind in "xyz"]
    assert told["mean_over_groups"]["type"] == pytest.approx(np.mean(by_type))
    over = told["over"]["bigram"]
    assert over["difference"] == pytest.approx(
        told["scorers"]["lm"]["accuracy"] - told["scorers"]["bigram"]["accuracy"]
    )
    assert over["ci95"][0] < over["difference"] < over["ci95"][1]


def test_the_order_of_pairs_changes_nothing() -> None:
    pairs, values = pairs_and_outcomes()
    order = np.random.default_rng(1).permutation(len(pairs))
    shuffled = summarise(
        [pairs[i] for i in order], {name: outcome[order] for name, outcome in values.items()}, 200, 0
    )
    assert shuffled == summarise(pairs, values, 200, 0)


def test_exact_probabilities_of_a_source_reach_the_accuracy_that_enumeration_gives() -> None:
    """Positive strings from a lexicon with noise, negative ones from a uniform source: all 27 x 27 pairs,
    weighted, against draws."""
    strings = list(itertools.product(range(3), repeat=3))
    chance = np.array([0.8 / 9 * ((a + b) % 3 == c) + 0.2 / 27 for a, b, c in strings])
    better = outcomes(chance[:, None], chance[None])
    oracle = float((chance[:, None] * better).sum() / 27)
    inside = 0.8 + 0.2 / 3
    assert oracle == pytest.approx(inside * 2 / 3 + 0.5 * (inside / 3 + (1 - inside) * 2 / 3))
    rng = np.random.default_rng(0)
    drawn = outcomes(chance[rng.choice(27, 20_000, p=chance)], chance[rng.integers(0, 27, 20_000)])
    # four standard errors
    assert drawn.mean() == pytest.approx(oracle, abs=4 * drawn.std() / math.sqrt(20_000))
