import time
from collections import Counter

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ctc.error_rates import Confusions, count_edits, error_rates, interval, resample, sum_by
from pretrain.ctc.rates_text import as_text

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "bab"]), max_size=6).map(" ".join)


def rate(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=5))
def test_counts_are_those_of_jiwer(pairs: list[tuple[str, str]]) -> None:
    wanted, got = map(list, zip(*pairs, strict=True))
    for counted, theirs in (
        ("words", jiwer.process_words(wanted, got)),
        ("characters", jiwer.process_characters(wanted, got)),
    ):
        ours = count_edits(wanted, got, counted)  # type: ignore[arg-type]
        assert [int(column.sum()) for column in ours] == [
            theirs.hits,
            theirs.substitutions,
            theirs.insertions,
            theirs.deletions,
        ]
        assert ours.total.sum() / ours.reference.sum() == (theirs.wer if counted == "words" else theirs.cer)


def slow_distance(wanted: list[str], got: list[str]) -> int:
    if not wanted or not got:
        return len(wanted) + len(got)
    return min(
        slow_distance(wanted[1:], got[1:]) + (wanted[0] != got[0]),
        slow_distance(wanted[1:], got) + 1,
        slow_distance(wanted, got[1:]) + 1,
    )


@given(WORDS, WORDS)
def test_edits_of_an_utterance_are_the_fewest_and_add_up(wanted: str, got: str) -> None:
    confusions = Confusions(Counter(), Counter(), Counter())
    edits = count_edits([wanted], [got], "words", confusions)
    assert edits.total[0] == slow_distance(wanted.split(), got.split())
    assert edits.reference[0] == len(wanted.split())
    assert edits.hits[0] + edits.substitutions[0] + edits.insertions[0] == len(got.split())
    assert [sum(counter.values()) for counter in confusions] == [
        edits.substitutions[0],
        edits.deletions[0],
        edits.insertions[0],
    ]
    assert all(one != other for one, other in confusions.substitutions)


def test_a_summary_counts_everything_once() -> None:
    summary = error_rates(
        ids=["u0", "u1", "u2", "u3", "u4", "u5"],
        speakers=["x", "y", "x", "z", None, "x"],
        references=["a b c", "a b", None, "", "b", "c"],
        hypotheses=["a x c", "", "whatever", "oh no", "b", "c d"],
    )
    assert {key: summary[key] for key in ("substitutions", "insertions", "deletions", "hits")} == {
        "substitutions": 1,
        "insertions": 3,
        "deletions": 2,
        "hits": 4,
    }
    assert (
        summary["scored_utterances"] == 5
        and summary["reference_words"] == 7
        and summary["hypothesis_words"] == 8
    )
    assert (
        summary["wer"] == 6 / 7
        and summary["cer"] == (1 + 3 + 5 + 0 + 2) / 10
        and summary["reference_characters"] == 10
    )
    assert summary["utterances_correct"] == 1 and summary["empty_hypotheses"] == 1
    assert summary["empty_references"] == 1 and summary["insertions_of_empty_references"] == 2
    assert summary["by_speaker"] == {
        "x": {
            "utterances": 2,
            "reference_words": 4,
            "wer": 0.5,
            "cer": 3 / 6,
            "substitutions": 1,
            "insertions": 1,
            "deletions": 0,
        },
        "y": {
            "utterances": 1,
            "reference_words": 2,
            "wer": 1.0,
            "cer": 1.0,
            "substitutions": 0,
            "insertions": 0,
            "deletions": 2,
        },
        "z": {
            "utterances": 1,
            "reference_words": 0,
            "wer": None,
            "cer": None,
            "substitutions": 0,
            "insertions": 2,
            "deletions": 0,
        },
    }
    assert [(row["id"], row["edits"]) for row in summary["worst"]] == [
        ("u3", 2),
        ("u1", 2),
        ("u5", 1),
        ("u0", 1),
    ]
    assert summary["worst"][1]["reference"] == "a b" and summary["worst"][1]["hypothesis"] == ""
    assert summary["confusions"] == {
        "substitutions": [["b", "x", 1]],
        "deletions": [["a", 1], ["b", 1]],
        "insertions": [["d", 1], ["no", 1], ["oh", 1]],
    }
    assert "wer_interval_speakers" not in summary  # whose voice u4 is, nobody knows


def test_phones_are_words_without_characters() -> None:
    summary = error_rates(["u"], ["s"], ["ð ə oʊ"], ["ð ʌ"], counted="phones")
    assert (
        summary["wer"] == 2 / 3
        and summary["counted"] == "phones"
        and not any("cer" in key for key in summary)
    )
    assert "PER" in as_text(summary) and "WER" not in as_text(summary)


def test_without_references_there_is_nothing_to_tell() -> None:
    assert error_rates([], [], [], []) == {}
    assert error_rates(["u", "v"], [None, None], [None, ""], ["a", ""]) == {}
    assert (
        as_text({"utterances": 2, "audio_seconds_per_second": 3.5})
        == "utterances                2\naudio_seconds_per_second  3.5"
    )


def test_resampling_by_value_has_the_moments_of_resampling_rows() -> None:
    rng = np.random.default_rng(0)
    columns = np.stack([rng.integers(0, 4, 60), rng.integers(3, 9, 60)], axis=1)
    rows = rng.integers(0, 60, (20_000, 60))
    fast, slow = rate(resample(columns, 20_000, 1)), rate(columns[rows].sum(axis=1))
    # Of 20,000 draws: the error of a mean is s / sqrt(20,000), of a standard deviation s / sqrt(40,000); four
    # of those, of both.
    s = slow.std()
    assert abs(fast.mean() - slow.mean()) < 4 * s * np.sqrt(2 / 20_000)
    assert abs(fast.std() - s) < 4 * s * np.sqrt(2 / 40_000)
    # A tail quantile is surer than 4 * sqrt(2 * 0.025 * 0.975 / 20,000) / density, the normal density there
    # being 0.058 / s.
    for share in (2.5, 97.5):
        assert (
            abs(np.percentile(fast, share) - np.percentile(slow, share))
            < 4 * np.sqrt(2 * 0.0244 / 20_000) / 0.058 * s
        )


def test_an_interval_covers_the_rate_of_the_population_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        words = rng.integers(5, 15, 100)
        quality = rng.beta(2, 8, 100)  # utterances differ, so words of one are no independent evidence
        found = interval(np.stack([rng.binomial(words, quality), words], axis=1), rate, 400, trial)
        assert found is not None
        covered += found[0] <= 0.2 <= found[1]
    # 95 % nominal, percentile bootstraps of 100 rows a little less; the binomial error of 400 trials is 1.1
    # %.
    assert 0.91 <= covered / 400 <= 0.98


def test_intervals_are_the_seed_s_whatever_the_order_of_utterances() -> None:
    rng = np.random.default_rng(3)
    wanted = [" ".join(rng.choice(["a", "b", "c"], 8)) for _ in range(50)]
    got = [" ".join(rng.choice(["a", "b", "c"], 8)) for _ in range(50)]
    ids, speakers = [f"u{n}" for n in range(50)], [f"s{n % 7}" for n in range(50)]
    order = rng.permutation(50).tolist()
    one = error_rates(ids, speakers, wanted, got)
    shuffled = [[column[n] for n in order] for column in (ids, speakers, wanted, got)]
    assert error_rates(*shuffled) == one  # type: ignore[arg-type]
    assert one["wer_interval"][0] < one["wer"] < one["wer_interval"][1]
    assert one["cer_interval_speakers"][0] < one["cer"] < one["cer_interval_speakers"][1]
    assert error_rates(ids, speakers, wanted, got, seed=1)["wer_interval"] != one["wer_interval"]


def test_speakers_that_differ_make_the_interval_over_speakers_the_wider_one() -> None:
    wanted, speakers = ["a b c d e"] * 200, [f"s{n % 4}" for n in range(200)]
    got = [("a b c d e", "a b c d e", "a b c d x", "x x x x x")[n % 4] for n in range(200)]
    summary = error_rates([f"u{n}" for n in range(200)], speakers, wanted, got)
    width = {key: np.diff(summary[key])[0] for key in ("wer_interval", "wer_interval_speakers")}
    assert width["wer_interval_speakers"] > 3 * width["wer_interval"]


def test_one_utterance_has_no_interval() -> None:
    summary = error_rates(["u"], [None], ["a b"], ["a"])
    assert summary["wer"] == 0.5 and summary["wer_interval"] is None and summary["by_speaker"] == {}
    assert "50.00%" in as_text(summary)


def test_draws_of_empty_references_alone_count_for_nothing() -> None:
    summary = error_rates(["u", "v"], [None, None], ["a", ""], ["b", ""])
    assert summary["wer"] == 1.0 and summary["wer_interval"] == [1.0, 1.0]


def test_sums_by_name_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    names, columns = [f"s{n}" for n in rng.integers(0, 5, 40)], rng.integers(0, 9, (40, 3))
    found, sums = sum_by(names, columns)
    assert found == sorted(set(names))
    for name, row in zip(found, sums, strict=True):
        assert row.tolist() == columns[[other == name for other in names]].sum(axis=0).tolist()


def test_the_text_for_a_terminal_has_rates_speakers_and_the_worst() -> None:
    wanted, got = ["a b c", "a b d", "c c"], ["a b c", "a x d", "x x"]
    rates = error_rates(["u0", "u1", "u2"], ["s", "t", "r"], wanted, got)
    text = as_text({"utterances": 4, "too_short": 0, "notes": ["2 words cannot be spelled"], **rates})
    lines = text.splitlines()
    assert (
        lines[0].startswith("WER")
        and "37.50%" in lines[0]
        and "over speakers [" in lines[0]
        and lines[1].startswith("CER")
    )
    assert "3 substituted, 0 inserted, 0 deleted, of 8 words in 3 utterances" in lines[2]
    assert next(line for line in lines if line.startswith("r ")).split()[:2] == ["r", "100.00%"]
    assert (
        lines[3].split() == ["utterances", "4"]
        and "too_short" not in text
        and lines[-1] == "2 words cannot be spelled"
    )
    assert "c → x (2), b → x (1)" in text and "u2" in text and all(line == line.rstrip() for line in lines)


@pytest.mark.slow
def test_a_hundred_thousand_utterances_take_seconds() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(2000)])
    wanted = [" ".join(words[rng.integers(0, 2000, length)]) for length in rng.integers(3, 20, 100_000)]
    got = [" ".join(word if rng.random() < 0.85 else "x" for word in text.split()) for text in wanted]
    ids, speakers = [f"u{n}" for n in range(100_000)], [f"s{n % 250}" for n in range(100_000)]
    began = time.monotonic()
    summary = error_rates(ids, speakers, wanted, got)
    assert time.monotonic() - began < 30  # 2 s on a quiet machine of 2026
    assert summary["wer"] == pytest.approx(0.15, abs=0.002)  # a million words: 0.15 +- 0.0004
