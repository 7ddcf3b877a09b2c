"""Splits against a search through all of them, and the invariants that no draw may break."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.splits import Split, draw_splits, notes_on_splits

LENGTHS = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.integers(1, 400).map(lambda tens: tens * 10.0),
    min_size=3,
    max_size=40,
)
SHARES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))


def asked(test: float, dev: float) -> list[Split]:
    return [Split(name, share) for name, share in (("test", test), ("dev", dev)) if share > 0]


def error(drawn: dict[str, str], seconds: dict[str, float], splits: list[Split], more: float = 0.0) -> float:
    """The sum over splits of how far they are from their share, in seconds."""
    total = sum(seconds.values()) + more
    has = {
        split.name: sum(seconds[name] for name, part in drawn.items() if part == split.name)
        for split in splits
    }
    return sum(abs(has[split.name] - split.share * total) for split in splits)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, SHARES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_every_split_gets_something_whatever_the_order_of_the_names(
    seconds: dict[str, float], shares: tuple[float, float], seed: int, random: Any
) -> None:
    splits = asked(*shares)
    drawn = draw_splits(seconds, splits, seed)
    assert drawn.keys() == seconds.keys() and set(drawn.values()) == {
        "train",
        *(split.name for split in splits),
    }
    shuffled = sorted(seconds)
    random.shuffle(shuffled)
    assert draw_splits({name: seconds[name] for name in shuffled}, splits, seed) == drawn


@settings(max_examples=60, deadline=None)
@given(LENGTHS.map(lambda lengths: dict(list(lengths.items())[:6])), SHARES, st.sampled_from([0.0, 500.0]))
def test_of_few_names_the_split_is_the_nearest_that_there_is(
    seconds: dict[str, float], shares: tuple[float, float], more: float
) -> None:
    splits = asked(*shares)
    parts = ["train", *(split.name for split in splits)]
    every = (
        dict(zip(seconds, row, strict=True))
        for row in itertools.product(parts, repeat=len(seconds))
        if set(row) == set(parts)
    )
    best = min(error(drawn, seconds, splits, more) for drawn in every)
    # targets are whole milliseconds
    assert error(draw_splits(seconds, splits, 0, more), seconds, splits, more) <= best + 0.01


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SHARES, st.integers(0, 5))
def test_no_move_and_no_swap_makes_a_split_nearer(
    seconds: dict[str, float], shares: tuple[float, float], seed: int
) -> None:
    splits = asked(*shares)
    drawn = draw_splits(seconds, splits, seed)
    found = error(drawn, seconds, splits)
    parts = {"train", *(split.name for split in splits)}
    others = [drawn | {name: part} for name in drawn for part in parts]
    others += [drawn | {a: drawn[b], b: drawn[a]} for a, b in itertools.combinations(drawn, 2)]
    assert (
        min(error(other, seconds, splits) for other in others if set(other.values()) == parts) >= found - 0.01
    )


def test_a_speaker_with_most_of_the_hours_is_not_drawn_to_be_tested() -> None:
    """The draw by number of speakers that was here before gave test 75 % of the hours with one seed of
    twelve."""
    seconds = {f"speaker{number}": 300.0 for number in range(11)} | {"the reader": 9900.0}
    for seed in range(20):
        drawn = draw_splits(seconds, asked(0.1, 0.1), seed)
        assert drawn["the reader"] == "train"
        assert [list(drawn.values()).count(split) for split in ("test", "dev")] == [
            4,
            4,
        ]  # 1,200 of 13,200 s; 1,320 are asked for


def test_another_seed_draws_other_names() -> None:
    seconds = {str(number): 10.0 for number in range(100)}
    first, second = (draw_splits(seconds, asked(0.1, 0.1), seed) for seed in (1, 2))
    assert first != second and [list(first.values()).count(split) for split in ("test", "dev")] == [10, 10]


def test_recordings_without_a_name_count_among_the_hours() -> None:
    drawn = draw_splits(
        {str(number): 10.0 for number in range(50)}, asked(0.1, 0.0), 0, seconds_of_train=500.0
    )
    assert list(drawn.values()).count("test") == 10


def test_a_hundred_thousand_utterances_are_split_to_within_a_second() -> None:
    seconds = {str(number): 1.0 + number % 1000 / 100 for number in range(100_000)}
    splits = asked(0.01, 0.02)
    assert error(draw_splits(seconds, splits, 0), seconds, splits) < 1.0


def test_too_few_names_are_an_error_with_the_remedy() -> None:
    with pytest.raises(
        ValueError,
        match="2 are too few to draw test and dev from and leave a train split; set dev_share or test",
    ):
        draw_splits({"a": 1.0, "b": 1.0}, asked(0.1, 0.1), 0)
    assert draw_splits({"a": 1.0}, [], 0) == {"a": "train"}


def test_short_and_large_splits_are_noted() -> None:
    assert notes_on_splits({"train": 800.0, "test": 120.0, "dev": 120.0}, asked(0.1, 0.1), "speaker") == []
    assert [
        note[:45]
        for note in notes_on_splits({"train": 60.0, "test": 119.0, "dev": 300.0}, asked(0.1, 0.5), "speaker")
    ] == [
        "split 'test' has 119 s, under two minutes: to",
        "split 'test' has 24.8% of the hours, and test",
        "split 'train' has 60 s, under two minutes: to",
    ]
