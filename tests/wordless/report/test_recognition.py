"""What the report says of recognisers, in words."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from wordless.report.recognition import (
    decoding_in_words,
    first_test,
    mark_words,
    p_value,
    points,
    recognisers_in_words,
    summarise_recognisers,
    transfer_in_words,
    transfer_rows,
    word_times,
)


def test_right_words_are_those_of_the_alignment_behind_wer() -> None:
    assert mark_words("the cat sat", "a the cat") == [("a", False), ("the", True), ("cat", True)]
    assert mark_words("the cat", "") == []


@pytest.mark.parametrize(
    ("pretrained", "scratch", "p", "verdict"),
    [
        (0.25, 0.75, 0.01, "helps"),
        (0.75, 0.25, 0.01, "hurts"),
        (0.25, 0.75, 0.2, "makes no certain difference to"),
        (0.251, 0.25, 0.001, "makes no difference to"),
        (0.25, 0.75, None, "helps"),
    ],
)
def test_only_what_chance_would_not_bring_is_called_better_or_worse(
    pretrained: float, scratch: float, p: float | None, verdict: str
) -> None:
    ctc: dict[str, Any] = {"wer_pretrained": pretrained, "wer_scratch": scratch}
    if p is not None:
        ctc["comparisons"] = {
            "pretrained": {"baseline": "scratch", "wer_difference_interval": [-0.6, -0.4], "p_value": p}
        }
    (words,) = recognisers_in_words(ctc, 0.005)
    assert words.startswith(
        f"Pretraining {verdict} the recogniser: {pretrained:.1%} of words wrong, {scratch:.1%} from random "
        "weights"
    )
    assert ("(95% interval of the difference −60.0 to −40.0 points, p " in words) is (p is not None)
    assert recognisers_in_words({"wer_pretrained": 0.5}, 0.005) == []


def test_the_way_of_decoding_is_told_as_it_was() -> None:
    beam = {
        "method": "beam",
        "lm": None,
        "lm_of": "words",
        "lm_weight": 3.23,
        "word_score": -0.26,
        "beam_size": 500,
        "lexicon": None,
    }
    assert (
        decoding_in_words(None)
        == decoding_in_words({"method": "greedy", "lm": None})
        == "greedily, without a language model"
    )
    assert decoding_in_words(beam) == "by beam search, without a language model"
    assert (
        decoding_in_words({**beam, "lexicon": "words.txt"})
        == "by beam search, without a language model but with a lexicon"
    )
    assert decoding_in_words({**beam, "lm": "lms/4-gram.arpa.gz"}) == (
        "by beam search with the language model 4-gram.arpa.gz (weight 3.23, word score -0.26, beam 500)"
    )
    assert decoding_in_words({**beam, "lm": "4-gram", "tuned": True}).endswith(
        "both weights chosen on these utterances)"
    )
    assert "language model of symbols 4-gram" in decoding_in_words(
        {**beam, "lm": "4-gram", "lm_of": "symbols"}
    )


class Tuned(NamedTuple):
    """Transcripts whose weights were found by `tune`."""

    folder: Path = Path("tuned")
    meta: dict[str, Any] = {  # noqa: RUF012 -- never written to
        "config": {
            "split": "dev",
            "decoding": {
                "method": "beam",
                "lm": "4.arpa",
                "lm_weight": 2.0,
                "word_score": -1.0,
                "beam_size": 9,
            },
        }
    }

    def read(self, name: str = "summary.json") -> Any:
        return {
            "wer": 0.5,
            "lm_weight": 0.5,
            "word_score": 0.0,
            "tuning": [{"lm_weight": 0.5, "word_score": 0.0, "wer": 0.5}],
        }


def test_the_weights_that_are_told_are_those_that_were_found() -> None:
    told = summarise_recognisers({}, {"tuned": Tuned()})["transcripts"]["tuned"]["decoding"]
    assert "(weight 0.5, word score 0, beam 9; both weights chosen on these utterances)" in told


def test_every_set_of_transcripts_has_its_own_split() -> None:
    other = Tuned(meta={"config": {**Tuned().meta["config"], "split": "test"}})
    told = summarise_recognisers({}, {"one": Tuned(), "two": other})
    assert {name: scores["split"] for name, scores in told["transcripts"].items()} == {
        "one": "dev",
        "two": "test",
    }


def test_without_a_transfer_nothing_is_said_of_one() -> None:
    assert (transfer_in_words({}), transfer_rows({}), first_test({})) == ([], [], [])
    units_only = {
        "curve": [{"test": "t", "budget": "1h", "system": "units", "label_minutes": 60.0}],
        "comparisons": [],
    }
    assert transfer_in_words(units_only) == [] and len(transfer_rows(units_only)) == 1


def test_numbers_are_written_as_in_papers() -> None:
    assert (p_value(0.0312), p_value(1e-10)) == ("= 0.031", "< 0.0001")
    assert points([-0.123, 0.01]) == "−12.3 to +1.0 points"
    assert word_times([{"word": "one", "start": 0.1, "end": 0.3}]) == "one 0.10–0.30"
