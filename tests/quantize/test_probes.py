"""Probes: planted answers, and the classifier of units against counting by hand."""

from collections import Counter

import numpy as np
import pytest

from quantize.probes import (
    histogram,
    phone_probe,
    pooled,
    speaker_frame_probe,
    speaker_probe,
    split_utterances,
)

PHONES = np.array(["a", "b", "c"])


def aligned_pieces(
    rng: np.random.Generator, num: int, dim: int = 6, spread: float = 0.1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Utterances of 50 frames whose features are their phone's corner and noise."""
    corners = np.eye(3, dim)
    numbers = rng.integers(0, 3, (num, 50))
    return [(PHONES[row], corners[row] + spread * rng.standard_normal((50, dim))) for row in numbers]


def test_utterances_become_shares_of_units_and_means_of_features():
    np.testing.assert_array_equal(histogram(np.array([0, 2, 2, 1], np.uint16), 4), [0.25, 0.25, 0.5, 0])
    np.testing.assert_array_equal(histogram(np.array([], np.uint16), 2), [0, 0])
    np.testing.assert_array_equal(pooled(np.array([[1, 2], [3, 6]], np.float16)), [2, 4])
    np.testing.assert_array_equal(pooled(np.ones((0, 3), np.float32)), [0, 0, 0])
    assert pooled(np.full((4000, 1), 60.0, np.float16)) == 60  # the sum is past float16's 65,504


def test_half_of_each_speakers_utterances_are_learnt_from():
    speakers = ["p"] * 5 + ["q"] * 4 + [None] * 6 + ["r"]
    training = split_utterances(speakers, seed=1)
    counts = Counter(speaker for speaker, trains in zip(speakers, training, strict=True) if trains)
    assert counts == {"p": 3, "q": 2, None: 3, "r": 1}
    np.testing.assert_array_equal(training, split_utterances(speakers, seed=1))
    assert (training != split_utterances(speakers, seed=2)).any()


def test_a_planted_speaker_is_told_and_noise_is_not():
    rng = np.random.default_rng(0)
    speakers = [f"s{number % 5}" for number in range(200)]
    voice = np.eye(5, 20)[np.arange(200) % 5]
    noise = rng.standard_normal((200, 20))
    found = speaker_probe(voice + 0.1 * noise, speakers)
    assert found == {
        "speaker_accuracy": 1.0,
        "speaker_chance": 0.2,
        "num_speakers": 5,
        "speaker_utterances": 100,
    }
    # 100 judged: a deviation of 0.04 around chance.
    assert speaker_probe(noise, speakers)["speaker_accuracy"] == pytest.approx(0.2, abs=0.12)


def test_vectors_that_say_nothing_are_at_chance_however_uneven_the_speakers():
    speakers = ["p"] * 90 + ["q"] * 10 + ["r"] * 4
    found = speaker_probe(np.ones((104, 3)), speakers)
    assert found["speaker_accuracy"] == pytest.approx(1 / 3) == found["speaker_chance"]


def test_the_scale_of_a_feature_does_not_matter():
    rng = np.random.default_rng(1)
    speakers = [f"s{number % 3}" for number in range(120)]
    vectors = np.eye(3)[np.arange(120) % 3] + 0.5 * rng.standard_normal((120, 3))
    scaled = vectors * [1e-4, 1, 1e5] + [1, -100, 1e4]
    assert speaker_probe(vectors, speakers) == speaker_probe(scaled, speakers)


def test_speakers_of_one_utterance_and_unknown_ones_are_left_out():
    vectors = np.eye(9)
    found = speaker_probe(vectors, ["p", "p", "q", "q", "q", "r", None, None, None])
    assert (found["num_speakers"], found["speaker_utterances"]) == (2, 2)
    assert "needs two" in speaker_probe(vectors, ["p"] * 7 + ["q", None])["reason"]
    assert "reason" in speaker_probe(vectors[:0], [])


def test_the_phone_of_a_unit_is_its_commonest_in_training():
    rng = np.random.default_rng(2)
    pieces = [(PHONES[rng.integers(0, 3, 40)], rng.integers(0, 6, 40).astype(np.uint16)) for _ in range(8)]
    train, test = pieces[:4], [*pieces[4:], (np.array(["d", "a", ""]), np.array([0, 99, 1], np.uint16))]
    counts: dict[int, Counter[str]] = {}
    for phones, units in train:
        for phone, unit in zip(phones.tolist(), units.tolist(), strict=True):
            counts.setdefault(unit, Counter())[phone] += 1
    overall = sum(counts.values(), Counter())
    commonest = max(sorted(overall), key=overall.__getitem__)
    right = majority = total = 0
    for phones, units in test:
        for phone, unit in zip(phones.tolist(), units.tolist(), strict=True):
            if phone:
                known = counts.get(unit)
                right += phone == (max(sorted(known), key=known.__getitem__) if known else commonest)
                majority += phone == commonest
                total += 1
    found = phone_probe(train, test)
    assert found == {
        "phone_accuracy": right / total,
        "phone_majority": majority / total,
        "phone_frames": total,
    }
    assert total == 162


def test_units_are_told_as_well_as_a_linear_classifier_of_one_hot_vectors_does():
    rng = np.random.default_rng(3)
    # Units and phones go together nine times in ten, so that no two phones are near a tie within a unit.
    numbers = [rng.integers(0, 3, 400) for _ in range(4)]
    units = [np.where(rng.random(400) < 0.9, row, rng.integers(0, 3, 400)) for row in numbers]
    pieces = [(PHONES[row], unit) for row, unit in zip(numbers, units, strict=True)]
    vectors = [(phones, np.eye(3)[unit]) for phones, unit in pieces]
    assert phone_probe(pieces[:2], pieces[2:]) == phone_probe(vectors[:2], vectors[2:])


def test_planted_phones_are_told_from_features_and_noise_is_not():
    rng = np.random.default_rng(4)
    train, test = aligned_pieces(rng, 20), aligned_pieces(rng, 20)
    found = phone_probe(train, test)
    assert (found["phone_accuracy"], found["phone_frames"]) == (1.0, 1000)
    noise = [(phones, rng.standard_normal(frames.shape)) for phones, frames in train + test]
    # 1,000 frames: a deviation of 0.015 around a third.
    assert phone_probe(noise[:20], noise[20:])["phone_accuracy"] == pytest.approx(1 / 3, abs=0.06)


def test_frames_are_drawn_by_the_seed_up_to_the_number_asked_for():
    rng = np.random.default_rng(5)
    train, test = aligned_pieces(rng, 20, spread=0.6), aligned_pieces(rng, 20, spread=0.6)
    found = phone_probe(train, test, max_frames=300, seed=1)
    assert found["phone_frames"] == 300
    assert (
        found
        == phone_probe(train, test, max_frames=300, seed=1)
        != phone_probe(train, test, max_frames=300, seed=2)
    )


def test_a_regression_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(7)
    train, test = aligned_pieces(rng, 20, spread=0.6), aligned_pieces(rng, 20, spread=0.6)
    units = [[(phones, np.full(50, 3)) for phones, _ in half] for half in (train, test)]
    speakers = [f"s{number % 3}" for number in range(60)]
    assert "stopped" not in phone_probe(train, test)
    monkeypatch.setattr("quantize.probes.MAX_ITERATIONS", 2)
    assert phone_probe(train, test)["stopped"] is True and "stopped" not in phone_probe(*units)
    assert speaker_probe(rng.standard_normal((60, 8)), speakers)["stopped"] is True


def test_the_speaker_of_a_frame_is_told_as_its_phone_is():
    rng = np.random.default_rng(6)
    train = [(speaker, rng.standard_normal((40, 4)) + 9 * place) for place, speaker in enumerate("pqr")]
    test = [(speaker, rng.standard_normal((30, 4)) + 9 * place) for place, speaker in enumerate("pqr")]
    assert speaker_frame_probe(train, test) == {
        "speaker_frame_accuracy": 1.0,
        "speaker_frame_majority": 1 / 3,
        "speaker_frames": 90,
    }
    units = [
        [(speaker, np.repeat([ord(speaker), 0], [10, 30])) for speaker, _ in half] for half in (train, test)
    ]
    # A quarter of the units are the speaker's own, the rest everybody's: those go to one of the three.
    assert speaker_frame_probe(*units)["speaker_frame_accuracy"] == pytest.approx(0.25 + 0.75 / 3)


def test_what_cannot_be_probed_says_why():
    silent = (np.array(["", ""]), np.zeros((2, 3)))
    alike = (np.array(["a", "a"]), np.zeros((2, 3)))
    for train, test, reason in [
        ([], [alike], "no frames with a phone to learn from"),
        ([alike], [silent], "no frames with a phone to be judged on"),
        ([alike], [alike], r"one phone only (a)"),
    ]:
        assert phone_probe(train, test)["reason"] == reason
    assert (
        speaker_frame_probe([("p", np.zeros((2, 3)))], [("p", np.zeros((2, 3)))])["reason"]
        == "one speaker only (p)"
    )


def test_features_that_are_not_numbers_are_an_error():
    broken = np.ones((4, 2))
    broken[1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        speaker_probe(broken, ["p", "p", "q", "q"])
