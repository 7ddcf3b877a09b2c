import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ctc.comparison import (
    SMALLEST_P,
    CompareConfig,
    Transcripts,
    as_text,
    compare,
    compare_tables,
    matched_pairs_p,
    paired_test,
    sign_flip_p,
)
from pretrain.store.artefact import commit, read_meta
from pretrain.store.disk import write_json

REFERENCES: list[str | None] = ["a b c d", "a a b", "c d", None, "d c b a", "b"]
BETTER = ["a b c d", "a a b", "c c", "x", "d c b a", "a"]
WORSE = ["a b c c", "a b", "c c", "y", "d d", "b"]


def table(hypotheses: list[str], **changes: Any) -> Transcripts:
    ids = [f"u{n}" for n in range(len(hypotheses))]
    return Transcripts(ids, [None] * len(ids), list(REFERENCES), hypotheses)._replace(**changes)


def folder(path: Path, hypotheses: list[str], **changes: Any) -> Path:
    """What `transcribe` leaves."""
    rows = table(hypotheses, **changes)
    path.mkdir()
    columns = {
        "id": rows.ids,
        "speaker": rows.speakers,
        "text": rows.references,
        "hypothesis": rows.hypotheses,
    }
    pq.write_table(pa.table(columns), path / "transcripts.parquet")
    write_json(path / "summary.json", {"utterances": len(rows.ids), "counted": rows.counted})
    commit(path, "transcripts", {}, {}, ["transcripts.parquet", "summary.json"])
    return path


@given(st.lists(st.integers(-6, 6), max_size=10))
def test_the_permutation_p_value_is_that_of_all_patterns_of_signs(differences: list[int]) -> None:
    observed = abs(sum(differences))
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    extreme = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed for signs in patterns
    )
    assert sign_flip_p(np.array(differences, np.int64)) == pytest.approx(extreme / len(patterns), abs=1e-12)


def test_the_permutation_p_value_of_ones_is_the_sign_test_s_at_any_size() -> None:
    for wins, losses in ((9, 1), (60, 40), (5_200, 4_800), (50_600, 49_400)):
        n = wins + losses
        logs = [
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(wins, n + 1)
        ]
        expected = 2 * math.fsum(math.exp(term) for term in logs)
        # lgamma near 1e6 is good to 1e-10, the transform to as much
        assert sign_flip_p(np.repeat([1, -1, 0], [wins, losses, 50])) == pytest.approx(
            expected, rel=1e-6, abs=1e-10
        )
    assert sign_flip_p(np.ones(200, np.int64)) == SMALLEST_P


def test_p_values_are_uniform_where_the_systems_are_alike() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, 150)
    found = []
    for _ in range(1000):
        difficulty = rng.beta(1, 4, 150)  # shared, as by two recognisers of the same utterance
        edits = rng.binomial(words, difficulty, (2, 150))
        found.append([sign_flip_p(edits[1] - edits[0]), matched_pairs_p(edits[1] - edits[0])])
    for level in (0.01, 0.05, 0.2, 0.5):
        shares = (np.array(found) <= level).mean(axis=0)
        # Three binomial errors of 1,000 trials, and what whole edits add: the permutation test is never
        # liberal, a little conservative.
        slack = 3 * math.sqrt(level * (1 - level) / 1000)
        assert np.all(np.abs(shares - level) < slack + 0.01)
        assert shares[0] <= level + slack


def test_a_real_difference_is_found_more_often_the_larger_it_is() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, 150)
    power = []
    for drop in (0.0, 0.05, 0.1):
        difficulty = 0.2 + np.zeros(150)
        p = [
            sign_flip_p(rng.binomial(words, difficulty - drop) - rng.binomial(words, difficulty))
            for _ in range(100)
        ]
        power.append(np.mean(np.array(p) < 0.05))
    assert power[0] < 0.15 and power[0] < power[1] < power[2] and power[2] > 0.95


def test_the_matched_pairs_p_value_is_the_normal_one() -> None:
    differences = np.array([0, 1, -2, 3, 1, 0, 1, 2])
    z = differences.mean() / (differences.std(ddof=1) / math.sqrt(8))
    assert matched_pairs_p(differences) == pytest.approx(2 * (1 - 0.5 * (1 + math.erf(z / math.sqrt(2)))))
    assert matched_pairs_p(np.zeros(5, np.int64)) == matched_pairs_p(np.array([3])) == 1.0
    assert matched_pairs_p(np.ones(5, np.int64)) == SMALLEST_P


def test_the_paired_interval_is_narrower_than_one_of_the_rates_apart() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, 200)
    a = rng.binomial(words, rng.beta(1, 2, 200))
    b = np.maximum(0, a - (rng.random(200) < 0.2))
    found = paired_test(np.stack([a, b, words], axis=1), 2000, 0)
    low, high = found["interval"]
    assert (
        found["difference"] == pytest.approx(found["b"] - found["a"]) and low < found["difference"] < high < 0
    )
    alone = np.std(a / words.mean()) / math.sqrt(200)
    assert high - low < alone  # each rate alone spans four times that
    assert found["probability_of_improvement"] == 1.0 and found["permutation_p"] < 1e-6


def test_a_comparison_counts_utterances_and_differences() -> None:
    summary = compare_tables(table(WORSE), table(BETTER), names=("old", "new"), draws=500)
    assert summary["names"] == ["old", "new"] and summary["utterances"] == 5 and summary["unscored"] == 1
    assert summary["wer"]["a"] == 6 / 14 and summary["wer"]["b"] == 2 / 14
    assert summary["wer"]["difference"] == -4 / 14
    assert [summary[key] for key in ("better", "worse", "same")] == [3, 1, 1]
    # differences -1, -1, 0, -3, +1: of 16 patterns of signs 2 reach 6 and 2 * 3 reach 4
    assert summary["wer"]["permutation_p"] == pytest.approx(8 / 16)
    assert [(row["id"], row["edits"]) for row in summary["improved"]] == [("u4", -3), ("u0", -1), ("u1", -1)]
    assert summary["worsened"] == [{"id": "u5", "edits": 1, "reference": "b", "a": "b", "b": "a"}]
    text = as_text(summary)
    assert (
        "old" in text
        and "new has fewer edits in 3, more in 1, as many in 1" in text
        and "left out: 1 without a reference" in text
    )


def test_systems_swapped_swap_everything() -> None:
    one, other = compare_tables(table(WORSE), table(BETTER)), compare_tables(table(BETTER), table(WORSE))
    for rate in ("wer", "cer"):
        assert one[rate]["difference"] == -other[rate]["difference"]
        assert one[rate]["permutation_p"] == other[rate]["permutation_p"]
        # 10,000 draws, another order: 1 % is two standard errors of a share of a half, and these are far from
        # it
        assert one[rate]["probability_of_improvement"] == pytest.approx(
            1 - other[rate]["probability_of_improvement"], abs=0.02
        )
    assert one["better"] == other["worse"] and [row["id"] for row in one["improved"]] == [
        row["id"] for row in other["worsened"]
    ]


def test_a_system_is_as_good_as_itself() -> None:
    summary = compare_tables(table(BETTER), table(BETTER))
    for rate in ("wer", "cer"):
        found = summary[rate]
        assert (
            found["difference"] == 0
            and found["interval"] == [0, 0]
            and found["probability_of_improvement"] == 0.5
        )
        assert found["permutation_p"] == found["matched_pairs_p"] == 1.0


def test_utterances_are_joined_by_id_and_those_of_one_side_counted() -> None:
    a = table(WORSE)
    rows = [4, 2, 0, 1]
    b = Transcripts(
        [f"u{n}" for n in rows] + ["other"],
        [None] * 5,
        [REFERENCES[n] for n in rows] + ["a"],
        [BETTER[n] for n in rows] + ["a"],
    )
    summary = compare_tables(a, b)
    assert (summary["utterances"], summary["only_a"], summary["only_b"], summary["unscored"]) == (4, 2, 1, 0)
    assert summary["wer"]["a"] == 6 / 13 and summary["wer"]["b"] == 1 / 13
    assert "2 only in a, 1 only in b" in as_text(summary)


def test_speakers_are_flipped_and_drawn_as_one() -> None:
    speakers = ["x", "y", "z", "x", "x", "y"]
    summary = compare_tables(table(WORSE, speakers=speakers), table(BETTER, speakers=speakers))
    # by speaker -4 (x), 0 (y), 0 (z): both patterns are as extreme
    assert summary["wer"]["permutation_p_speakers"] == pytest.approx(1.0)
    assert summary["wer"]["interval_speakers"][0] < summary["wer"]["difference"]
    assert "over speakers" in as_text(summary)


def test_phones_are_compared_with_phones_only() -> None:
    phones = table(BETTER, counted="phones")
    summary = compare_tables(table(WORSE, counted="phones"), phones)
    assert "cer" not in summary and "PER" in as_text(summary)
    with pytest.raises(ValueError, match="one is of words and the other of phones"):
        compare_tables(table(WORSE), phones)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"references": ["A B C D", *REFERENCES[1:]]},
            r"1 references differ, such as that of 'u0': 'a b c d' and 'A B C D'; transcribe",
        ),
        ({"references": ["a b c d", None, *REFERENCES[2:]]}, "1 references differ, such as that of 'u1'"),
        (
            {"ids": [f"v{n}" for n in range(6)]},
            r"no utterance in common: one has \['u0'\], the other \['v0'\]",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    a, b = folder(tmp_path / "a", WORSE), folder(tmp_path / "b", BETTER, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        compare(CompareConfig(out=str(tmp_path / "out"), a=str(a), b=str(b)))
    assert str(a) in str(caught.value) and str(b) in str(caught.value)


def test_transcripts_without_any_reference_are_refused() -> None:
    nothing = table(BETTER, references=[None] * 6)
    with pytest.raises(ValueError, match="no utterance has a reference"):
        compare_tables(nothing, nothing)


def test_words_written_of_silence_count(tmp_path: Path) -> None:
    silent = ["", *REFERENCES[1:]]
    summary = compare_tables(
        table(WORSE, references=silent), table(["", *BETTER[1:]], references=silent), draws=200
    )
    assert summary["utterances"] == 5 and summary["reference_words"] == 10
    assert (summary["wer"]["a"], summary["wer"]["b"]) == (9 / 10, 2 / 10)  # four words inserted by the first
    assert summary["improved"][0] == {"id": "u0", "edits": -4, "reference": "", "a": WORSE[0], "b": ""}


def test_the_two_have_different_names() -> None:
    with pytest.raises(ValueError, match="both are 'a'; give the two different names"):
        CompareConfig(out="out", a="a", b="b", names=("a", "a"))


def test_the_verb_writes_its_summary_with_its_parents(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", WORSE), folder(tmp_path / "b", BETTER)
    config = CompareConfig(out=str(tmp_path / "out"), a=str(a), b=str(b), draws=200)
    summary = compare(config)
    meta = read_meta(config.out, "comparison")
    assert meta["parents"] == {"a": read_meta(a)["fingerprint"], "b": read_meta(b)["fingerprint"]}
    assert summary == compare_tables(table(WORSE), table(BETTER), draws=200)
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        compare(config)
    with pytest.raises(ValueError, match="is a 'comparison'; a 'transcripts' is needed here"):
        compare(CompareConfig(out=str(tmp_path / "again"), a=str(a), b=config.out))
