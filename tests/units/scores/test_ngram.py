import math

import numpy as np
import pytest

from units.scores.ngram import Ngram

K = 6  # BOS 6, EOS 7


def sequences(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        np.concatenate([[K], rng.choice(K, rng.integers(1, 12), p=[0.4, 0.2, 0.2, 0.1, 0.1, 0.0]), [K + 1]])
        for _ in range(count)
    ]


def slow_kneser_ney(
    train: list[list[int]], discounts: list[float], history: tuple[int, ...], word: int
) -> float:
    """Interpolated Kneser-Ney as Chen & Goodman (1999) write it: sums over the vocabulary of counts made by
    walking the text."""
    order, n = len(discounts), len(history) + 1

    def occurrences(gram: tuple[int, ...]) -> list[int]:
        """The symbol to the left of each occurrence of `gram` that ends in a predicted symbol."""
        found = []
        for s in ([K] * (order - 1) + sequence for sequence in train):
            ends = range(order, len(s))
            found += [s[end - len(gram)] for end in ends if tuple(s[end - len(gram) + 1 : end + 1]) == gram]
        return found

    def count(gram: tuple[int, ...]) -> int:
        left = occurrences(gram)
        return len(left) if n == order or gram[0] == K else len(set(left))

    lower = slow_kneser_ney(train, discounts, history[1:], word) if n > 1 else 1 / (K + 1)
    counts = {w: count((*history, w)) for w in [*range(K), K + 1]}
    total, types = sum(counts.values()), sum(c > 0 for c in counts.values())
    if total == 0:
        return lower
    return max(counts[word] - discounts[n - 1], 0) / total + discounts[n - 1] * types / total * lower


@pytest.mark.parametrize("discounts", [[0.2], [0.3, 0.6], [0.3, 0.6, 0.8]])
def test_probabilities_equal_a_brute_force_count(discounts: list[float]) -> None:
    order = len(discounts)
    train, held_out = (
        sequences(30, 0),
        [*sequences(3, 1), np.array([K, 5, 5, 0, K + 1])],
    )  # 5 is never seen in training
    model = Ngram(train, K, order, np.array(discounts))
    texts = [s.tolist() for s in train]
    for sequence in held_out:
        padded = [K] * (order - 2) + sequence.tolist()
        ends = range(len(padded) - len(sequence) + 1, len(padded))
        expected = [
            math.log(slow_kneser_ney(texts, discounts, tuple(padded[e - order + 1 : e]), padded[e]))
            for e in ends
        ]
        # float64 sums in another order
        np.testing.assert_allclose(model.log_probabilities(sequence), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_every_next_symbol_sum_to_one(order: int) -> None:
    model = Ngram.fit(sequences(40, 0), K, order)
    for prefix in ([K], [K, 0], [K, 5, 5], [K, 0, 1, 2]):
        total = sum(
            math.exp(model.log_probabilities(np.array([*prefix, word]))[-1]) for word in [*range(K), K + 1]
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_discounts_come_from_training_documents_and_nearly_reach_the_best_on_held_out_ones() -> None:
    train, held_out = sequences(400, 0), sequences(200, 1)

    def loss(model: Ngram) -> float:
        return -float(sum(model.log_probabilities(s).sum() for s in held_out)) / sum(
            len(s) - 1 for s in held_out
        )

    best = min(
        loss(Ngram(train, K, 2, np.array([a, b])))
        for a in np.linspace(0.05, 0.95, 7)
        for b in np.linspace(0.05, 0.95, 7)
    )
    assert loss(Ngram.fit(train, K, 2)) < best + 0.005


def test_one_document_is_enough_to_fit() -> None:
    model = Ngram.fit([np.array([K, 0, 1, 0, 1, 0, 1, 0, 1, K + 1])], K, 2)
    assert model.log_probabilities(np.array([K, 0, 1, 0, K + 1])).shape == (4,)


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, sequence = sequences(30, 0), sequences(1, 1)[0]
    whole = Ngram(train, K, 3).log_probabilities(sequence)
    monkeypatch.setattr("units.scores.ngram.KEYS_AT_ONCE", 20)
    np.testing.assert_array_equal(Ngram(train, K, 3).log_probabilities(sequence), whole)


def test_documents_scored_together_have_the_sums_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held_out = Ngram.fit(sequences(40, 0), K, 3), sequences(20, 1)
    monkeypatch.setattr("units.scores.ngram.KEYS_AT_ONCE", 25)
    expected = [model.log_probabilities(sequence).sum() for sequence in held_out]
    # float64 sums, rounded once or at every step
    np.testing.assert_allclose(model.log_likelihoods(held_out), expected, rtol=1e-12)


def test_the_same_symbols_in_another_order_have_the_very_same_unigram_score() -> None:
    rng, model = np.random.default_rng(0), Ngram.fit(sequences(40, 0), K, 1)
    for sequence in sequences(50, 1):
        shuffled = np.concatenate([[K], rng.permutation(sequence[1:-1]), [K + 1]])
        one, other = model.log_likelihoods([sequence, shuffled])
        assert one == other


def test_without_an_end_the_units_alone_share_the_probability() -> None:
    model = Ngram.fit([sequence[:-1] for sequence in sequences(40, 0)], K, 2, ends=False)
    for prefix in ([K], [K, 0], [K, 5]):
        total = sum(math.exp(model.log_probabilities(np.array([*prefix, word]))[-1]) for word in range(K))
        assert total == pytest.approx(1, abs=1e-12)
