"""ABX: against loops over triples, and where the answer is known beforehand."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pretrain.data.utterance import Phone, Utterance
from quantize import abx as abx_module
from quantize import dtw
from quantize.abx import abx, draw_speakers, draw_tokens
from quantize.phone_tokens import Items, phone_items
from tests.reference import abx as reference

MODES = ("within", "across")


def tokens_at_random(rng: np.random.Generator, num_tokens: int = 60, longest: int = 6) -> Items:
    """Tokens end to end in two utterances: 4 phones, 4 speakers, 2 contexts, in groups as uneven as chance
    makes them."""
    length = rng.integers(1, longest + 1, num_tokens)
    utterance = np.arange(num_tokens) % 2
    last = np.where(utterance, np.cumsum(length * utterance), np.cumsum(length * (1 - utterance)))
    phone, context, speaker = (rng.integers(0, size, num_tokens) for size in (4, 2, 4))
    return Items(
        utterance,
        last - length,
        last,
        phone,
        context,
        speaker,
        ["u", "v"],
        list("abcd"),
        ["k", "l"],
        list("pqrs"),
    )


def frames_of(items: Items, rng: np.random.Generator, distance: str) -> dict[str, np.ndarray]:
    """Labels of three classes, so that very many distances tie; or features, every sixth frame zero."""
    sizes = {name: int(items.last[items.utterance == number].max()) for number, name in enumerate(items.ids)}
    if distance == "discrete":
        return {name: rng.integers(0, 3, size).astype(np.uint16) for name, size in sizes.items()}
    return {
        name: rng.standard_normal((size, 5)) * (rng.random((size, 1)) < 5 / 6) for name, size in sizes.items()
    }


def by_loops(
    items: Items, features: dict[str, np.ndarray], mode: str, distance: str, speakers_of_x
) -> tuple[float | None, int, int]:
    columns = zip(
        items.utterance, items.first, items.last, items.context, items.speaker, items.phone, strict=True
    )
    tokens = [
        (
            items.contexts[context],
            items.speakers[speaker],
            items.phones[phone],
            features[items.ids[utterance]][first:last],
        )
        for utterance, first, last, context, speaker, phone in columns
    ]
    named = {
        (items.contexts[context], items.phones[phone], items.speakers[speaker]): [
            items.speakers[other] for other in others
        ]
        for (context, phone, speaker), others in speakers_of_x.items()
    }
    return reference.abx(tokens, mode, distance, named)


@pytest.mark.parametrize("draws", [(None, None), (3, 2)], ids=["all", "drawn"])
@pytest.mark.parametrize("distance", ["angular", "cosine", "discrete"])
@pytest.mark.parametrize("mode", MODES)
def test_the_score_is_that_of_loops_over_triples(mode, distance, draws):
    rng = np.random.default_rng([len(mode), len(distance)])
    max_group, max_x_across = draws
    items = tokens_at_random(rng)
    features = frames_of(items, rng, distance)
    score = abx(
        items, features, mode=mode, distance=distance, max_group=max_group, max_x_across=max_x_across, seed=3
    )
    drawn = draw_tokens(items, max_group, seed=3)
    error, num_cells, num_triples = by_loops(
        drawn, features, mode, distance, draw_speakers(drawn, max_x_across, seed=3)
    )
    assert score.error == pytest.approx(error, abs=1e-12)  # the same numbers, averaged in another order
    assert (score.num_cells, score.num_triples) == (num_cells, num_triples)
    assert np.nanmean(score.contrasts) == score.error


def test_float32_features_score_as_float64_ones():
    rng = np.random.default_rng(0)
    items = tokens_at_random(rng, 100)
    features = {name: values.astype(np.float32) for name, values in frames_of(items, rng, "angular").items()}
    wide = {name: values.astype(np.float64) for name, values in features.items()}
    for mode in MODES:
        score = abx(items, features, mode=mode)
        # A triple that decides otherwise would show, being at least 1e-6 of the score. Lengths of 1 in
        # float32 move one frame distance in a hundred to the next step of 2^-16, and no triple here is as
        # close as that.
        assert score.error == pytest.approx(abx(items, wide, mode=mode).error, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 300, 5000])
@pytest.mark.parametrize("distance", ["angular", "cosine", "discrete"])
def test_scores_do_not_depend_on_how_much_is_aligned_at_a_time(distance, batch, monkeypatch):
    rng = np.random.default_rng(1)
    items = tokens_at_random(rng, 150)
    labels = frames_of(items, rng, "discrete")
    several = [labels]
    if distance != "discrete":  # centroids tie all the time: the same sums in another order
        centroids = rng.standard_normal((3, 99)).astype(np.float32)
        several = [
            frames_of(items, rng, distance),
            {name: centroids[units] for name, units in labels.items()},
        ]

    def scores() -> list[bytes]:
        return [
            abx(items, features, mode=mode, distance=distance).contrasts.tobytes()
            for features in several
            for mode in MODES
        ]

    expected = scores()
    monkeypatch.setattr(dtw, "BATCH", batch)
    monkeypatch.setattr(dtw, "CHUNK", batch // 4 + 1)
    monkeypatch.setattr(abx_module, "COMPARISONS", batch)
    assert scores() == expected


@pytest.mark.parametrize("distance", ["angular", "cosine"])
def test_the_same_centroids_in_another_order_are_equally_far(distance):
    # x is four times one frame; tokens a and b are the same four centroids, in two orders whose float32 sums
    # would differ.
    rng = np.random.default_rng(12)
    for _ in range(20):
        one, *others = rng.standard_normal((5, 64)).astype(np.float32)
        a, b = np.stack(others), np.stack(others)[rng.permutation(4)]
        features = {"u": np.concatenate([np.stack([one] * 4), a, b])}
        first = np.array([0, 4, 8])
        tokens = dtw.Tokens(["u"], dtw.Spans(first * 0, first, first + 4), features, distance)
        place = np.arange(3)
        ((_, found),) = dtw.aligned(
            tokens, [dtw.Block(place[:1], place[1:], np.zeros(2, np.int64), np.arange(2))]
        )
        assert (found[:, 0] == found[:, 1]).all() and (found > 0).all()


def test_very_long_tokens_are_summed_exactly_too():
    # 400 frames at up to 2 are past 256, where float32 has steps larger than 2^-16.
    rng = np.random.default_rng(13)
    frames = rng.standard_normal((700, 3)) * [
        10,
        1,
        1,
    ]  # one direction and its opposite: distances near 0 and near 2
    spans = dtw.Spans(np.zeros(2, np.int64), np.array([0, 300]), np.array([300, 700]))
    tokens = dtw.Tokens(["u"], spans, {"u": frames}, "cosine")
    assert tokens.dtype == np.float64
    ((_, found),) = dtw.aligned(
        tokens, [dtw.Block(np.array([0]), np.array([1]), np.zeros(1, np.int64), np.zeros(1, np.int64))]
    )
    costs = tokens.costs(np.array([0]), np.array([1]))
    assert found[:, 0].tolist() == [reference.dtw(costs), reference.dtw(costs.T)]


def test_frame_distances_are_those_of_a_loop_to_the_last_bit():
    rng = np.random.default_rng(14)
    frames = rng.standard_normal((40, 20))
    place = np.arange(40)
    for distance in ("angular", "cosine"):
        tokens = dtw.Tokens(["u"], dtw.Spans(place * 0, place, place + 1), {"u": frames}, distance)
        measured = reference.frame_distance(distance)
        costs = tokens.costs(place[:10], place[10:])
        assert costs.dtype == np.float32 and costs.tolist() == [
            [measured(a, b) for b in frames[10:]] for a in frames[:10]
        ]


def test_equal_frames_are_one_in_the_order_in_which_they_come():
    # not in that of a hash, which is another in every process
    frames = np.array([[3, 4], [0, 1], [3, 4], [1, 0], [0, 1]], np.float32)
    tokens = dtw.Tokens(
        ["u"],
        dtw.Spans(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, 5)),
        {"u": frames},
        "angular",
    )
    np.testing.assert_array_equal(tokens._distinct, np.array([[0.6, 0.8], [0, 1], [1, 0]], np.float32))
    np.testing.assert_array_equal(tokens._frame, [0, 1, 0, 2, 1])


@pytest.mark.parametrize("draw", ["ties", "distances"])
def test_many_alignments_at_once_are_those_of_a_textbook_in_both_directions(draw):
    rng = np.random.default_rng(2)
    rows, cols = rng.integers(1, 12, (2, 200))
    lattices = [
        rng.integers(0, 3, (n, m)) * 1.0 if draw == "ties" else rng.random((n, m))
        for n, m in zip(rows, cols, strict=True)
    ]
    first = np.cumsum(rows * cols) - rows * cols
    flat = np.concatenate([lattice.ravel() for lattice in lattices])
    found = dtw.warped(flat, first, cols, np.ones_like(cols), rows, cols)
    expected = [
        [reference.dtw(lattice) for lattice in lattices],
        [reference.dtw(lattice.T) for lattice in lattices],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-13)  # sums of at most 22 float64 numbers
    if draw == "ties":
        assert (found[0] != found[1]).any()  # the path's length does depend on the direction


def planted(rng: np.random.Generator, size: int = 300, length: int = 3) -> tuple[Items, np.ndarray]:
    """Tokens of one length, and the phone of each frame."""
    items = tokens_at_random(rng, size)
    first = np.arange(size) * length
    items = replace(items, utterance=np.zeros(size, np.int64), first=first, last=first + length)
    return items, np.repeat(items.phone, length)


@pytest.mark.parametrize("mode", MODES)
def test_features_that_are_the_phone_make_no_errors(mode):
    items, phones = planted(np.random.default_rng(4))
    for context in (items.context, np.zeros_like(items.context)):
        cut = replace(items, context=context)
        assert abx(cut, {"u": np.eye(4)[phones]}, mode=mode).error == 0
        assert (
            abx(cut, {"u": np.eye(4, dtype=np.float32)[phones] * 3}, mode=mode, distance="cosine").error == 0
        )
        assert abx(cut, {"u": phones.astype(np.uint16)}, mode=mode, distance="discrete").error == 0
        assert abx(cut, {"u": -np.eye(4)[phones]}, mode=mode).error == 0


@pytest.mark.parametrize("mode", MODES)
def test_features_that_know_nothing_of_the_phone_are_at_chance(mode):
    rng = np.random.default_rng(5)
    items, phones = planted(rng, 600)
    score = abx(items, {"u": rng.standard_normal((len(phones), 4))}, mode=mode)
    # Triples share tokens: as if there were one comparison for each of 600 tokens, a deviation of 0.02.
    assert score.error == pytest.approx(0.5, abs=0.06)
    assert score.num_triples > 10_000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_that_are_all_the_same_are_exactly_at_chance(mode, dtype):
    rng = np.random.default_rng(6)
    items = tokens_at_random(rng, 120)
    for frame in (rng.standard_normal(256), np.zeros(256)):
        features = {name: np.tile(frame.astype(dtype), (400, 1)) for name in items.ids}
        assert abx(items, features, mode=mode).error == 0.5
    assert (
        abx(items, {name: np.ones(400, np.int64) for name in items.ids}, mode=mode, distance="discrete").error
        == 0.5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_frames_are_equally_far_to_the_last_bit(dtype):
    # A matrix product is not: its last bits depend on the place in the matrix. Centroids as features tie all
    # the time.
    rng = np.random.default_rng(7)
    for num_tokens in (7, 20, 47, 700):
        units = rng.integers(0, 5, num_tokens)
        features = {"u": rng.standard_normal((5, 99)).astype(dtype)[units]}
        place = np.arange(num_tokens)
        tokens = dtw.Tokens(["u"], dtw.Spans(place * 0, place, place + 1), features, "cosine")
        rows, cols = place[: num_tokens // 3], place[num_tokens // 3 :]
        for a, b in [(rows, cols), (place, place), (cols, place)]:
            costs = tokens.costs(a, b)
            for one in range(5):
                for other in range(5):
                    assert len(np.unique(costs[np.ix_(units[a] == one, units[b] == other)])) <= 1


def test_contexts_are_averaged_before_speakers_and_speakers_before_phone_pairs():
    # fastabx's documentation, "ABX discriminability": contexts 0 and 1 of speaker 1, context 1 of speaker 2
    # make 0.75.
    cells = [
        (0, 0, np.array([1]), np.array([0.0])),
        (0, 0, np.array([1]), np.array([1.0])),
        (1, 0, np.array([1]), np.array([1.0])),
    ]
    contrasts = abx_module._averaged([*cells, (0, 1, np.array([0]), np.array([0.25]))], 2)
    np.testing.assert_array_equal(contrasts, [[np.nan, 0.75], [0.25, np.nan]])


def speech(
    name: str, phones: Sequence[tuple[float, float, str]], *, speaker: str | None = "s", frames: int = 100
) -> Utterance:
    return Utterance(
        name,
        name,
        0,
        400 + 320 * (frames - 1),
        16000,
        speaker=speaker,
        phones=[Phone(*phone) for phone in phones],
    )


def described(items: Items) -> list[tuple[str, str, str, int, int]]:
    columns = zip(items.utterance, items.phone, items.context, items.first, items.last, strict=True)
    return [
        (items.ids[u], items.phones[p], items.contexts[c], int(first), int(last))
        for u, p, c, first, last in columns
    ]


def test_a_token_has_the_frames_whose_middles_lie_in_it():
    utterance = speech(
        "u",
        [(0.0, 0.03, "a"), (0.03, 0.0699, "b"), (0.07, 0.29, "a"), (0.29, 0.295, "b"), (0.295, 9.0, "a")],
        frames=20,
    )
    # Middles are 0.01, 0.03, 0.05 … s: 0.03 is in both a and b (fastabx: both ends included), 0.07 is not in
    # the first b. In floating point 0.07 s · 50 Hz is a little more than 3.5 and 0.29 s · 50 Hz a little less
    # than 14.5: frames 3 and 14 are the middle a's all the same. The last a ends with the audio.
    assert described(phone_items([utterance], context="any")) == [
        ("u", "a", "", 0, 2),
        ("u", "b", "", 1, 3),
        ("u", "a", "", 3, 15),
        ("u", "b", "", 14, 15),
        ("u", "a", "", 15, 20),
    ]
    assert described(phone_items([utterance], context="phoneme")) == [
        ("u", "b", "a a", 1, 3),
        ("u", "a", "b b", 3, 15),
        ("u", "b", "a a", 14, 15),
    ]
    assert described(phone_items([utterance])) == [
        ("u", "b", "a a", 0, 15),
        ("u", "a", "b b", 1, 15),
        ("u", "b", "a a", 3, 20),
    ]


def test_tokens_without_a_frame_and_utterances_without_phones_or_speaker_are_left_out():
    rows = [
        speech("u", [(0.0, 0.02, "a"), (0.02, 0.029, "b"), (0.031, 0.05, "c"), (5.0, 6.0, "d")]),
        speech("v", [(0.0, 1.0, "a")], speaker=None),
        replace(speech("w", []), phones=None),
    ]
    assert described(phone_items(rows, context="any")) == [("u", "a", "", 0, 1), ("u", "c", "", 2, 3)]


def test_silence_and_pauses_are_neither_tokens_nor_neighbours():
    phones = [
        (0.0, 0.1, "a"),
        (0.1, 0.2, "b"),
        (0.2, 0.3, "c"),
        (0.3, 0.4, "sil"),
        (0.4, 0.5, "d"),
        (0.5, 0.6, "e"),
        (0.63, 0.7, "f"),
        (0.7, 0.8, "g"),
    ]
    items = phone_items([speech("u", phones)], silence=["sil"])
    assert [(phone, context) for _, phone, context, _, _ in described(items)] == [("b", "a c")]
    assert phone_items([speech("u", phones)], context="any", silence=["sil"]).phones == list("abcdefg")


def test_neither_the_order_of_rows_nor_of_tokens_changes_the_score():
    rng = np.random.default_rng(8)
    rows = []
    for number in range(30):
        times = np.cumsum(rng.uniform(0.03, 0.1, 21))
        phones = [(start, end, str(rng.choice(list("abc")))) for start, end in itertools.pairwise(times)]
        rows.append(speech(f"u{number:02d}", phones, speaker=f"s{number % 7}", frames=60 + number))
    features = {row.id: rng.standard_normal((row.num_frames, 6)) for row in rows}
    items, shuffled = phone_items(rows), phone_items([rows[place] for place in rng.permutation(len(rows))])
    for mode in MODES:
        score = abx(items, features, mode=mode, max_group=2, max_x_across=2, seed=1)
        assert abx(shuffled, features, mode=mode, max_group=2, max_x_across=2, seed=1).error == score.error
        assert (
            abx(
                items.take(rng.permutation(len(items))),
                features,
                mode=mode,
                max_group=2,
                max_x_across=2,
                seed=1,
            ).error
            == score.error
        )
        assert abx(items, features, mode=mode, max_group=2, max_x_across=2, seed=2).error != score.error


def test_no_group_is_larger_than_asked_for_and_small_ones_stay_whole():
    items = tokens_at_random(np.random.default_rng(9), 200)
    drawn = draw_tokens(items, 3, seed=0)
    before, after = (
        dict(zip(*np.unique(abx_module._keys(some), return_counts=True), strict=True))
        for some in (items, drawn)
    )
    assert after == {key: min(3, count) for key, count in before.items()}
    others = draw_speakers(drawn, 2, seed=0)
    assert {len(chosen) for chosen in others.values()} == {2}
    assert all(speaker not in chosen for (_, _, speaker), chosen in others.items())


def test_nothing_to_compare_is_no_score_and_says_why():
    items = tokens_at_random(np.random.default_rng(10))
    features = frames_of(items, np.random.default_rng(0), "angular")
    alone = items.take(items.speaker == 0)
    once = items.take(np.array([int(np.flatnonzero(items.phone == phone)[0]) for phone in range(4)]))
    assert abx(alone, features, mode="within").error is not None
    for some, mode, reason in [
        (alone, "across", "one speaker"),
        (once, "within", "spoken twice"),
        (items.take(items.phone < 0), "within", "no phone tokens"),
    ]:
        score = abx(some, features, mode=mode)
        assert (score.error, score.num_cells, score.num_triples) == (None, 0, 0)
        assert reason in score.reason and np.isnan(score.contrasts).all()


def test_features_that_do_not_fit_are_named():
    items = tokens_at_random(np.random.default_rng(11))
    features = frames_of(items, np.random.default_rng(0), "angular")
    broken = features["v"].copy()
    broken[5] = np.nan
    for wrong, distance, message in [
        ({"u": features["u"]}, "angular", "no features for utterance 'v'"),
        (
            features | {"v": features["v"][:-2]},
            "angular",
            "'v' has .* frames of features and a token that ends at",
        ),
        (features | {"v": broken}, "angular", "'v' has NaN or infinity"),
        (features, "discrete", "'u' has an array .* of float64"),
        (
            {name: np.zeros(len(values), np.int64) for name, values in features.items()},
            "cosine",
            "'u' has an array .* of int64",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            abx(items, wrong, mode="within", distance=distance)
    # The last frame may be missing: encoders and alignments round the end of the audio differently.
    assert abx(items, features | {"v": features["v"][:-1]}, mode="within").error is not None
