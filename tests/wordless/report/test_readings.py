"""The page in words, of numbers that point one way and the other."""

from typing import Any

import numpy as np
import pytest

from wordless.report.captions import of_layers, of_matrix, of_rates, of_training
from wordless.report.figures import PhoneCounts
from wordless.report.readings import (
    cautions,
    compare,
    glance,
    in_words,
    missing,
    of_recognisers,
    of_sounds,
    of_units,
    spoken_time,
)


def sweep(*pnmi: float, **more: list[float]) -> dict[str, Any]:
    """A sweep over layers 0, 1, … that chose layer 1."""
    layers = {str(layer): {"pnmi": value} for layer, value in enumerate(pnmi)}
    for key, values in more.items():
        for layer, value in enumerate(values):
            layers[str(layer)][key] = value
    return {"layers": layers, "layer": 1}


def counted(**changes: Any) -> dict[str, Any]:
    """The `audio` of a summary: a corpus with everything."""
    splits = {name: {"hours": 1.0, "utterances": 10, "speakers": 3} for name in ("train", "dev", "test")}
    known = {"with_speaker": 30, "with_text": 30, "with_phones": 30}
    audio = {
        "hours": 3.0,
        "utterances": 30,
        "speakers": 9,
        "quarantined": 0,
        "splits": splits,
        "held_out": ["dev", "test"],
        **known,
    }
    return audio | changes


def test_that_layer_0_beats_the_chosen_layer_is_discussed_and_not_only_shown() -> None:
    (lost,) = of_layers(sweep(0.566, 0.550))
    assert "worse than layer 0, which is the input of the first layer: PNMI 0.550 against 0.566" in lost
    assert "the encoder has not learned more about phones than its input already shows" in lost
    (level,) = of_layers(sweep(0.550, 0.552))
    assert "no better than layer 0" in level and "has added nothing" in level
    (won,) = of_layers(sweep(0.40, 0.55))
    assert "better than layer 0" in won and "has made the phones easier to find" in won


def test_abx_that_gets_worse_across_speakers_is_said_beside_abx_that_gets_better_within_one() -> None:
    words = " ".join(
        of_layers(sweep(0.4, 0.5, abx_within_features=[0.031, 0.017], abx_across_features=[0.043, 0.060]))
    )
    assert "ABX error within a speaker goes from 3.1% at layer 0 to 1.7% at layer 1: better." in words
    assert "ABX error across speakers goes from 4.3% at layer 0 to 6.0% at layer 1: worse." in words
    assert "those of different voices less well" in words
    same = " ".join(of_layers(sweep(0.4, 0.5, abx_within_features=[0.031, 0.030])))
    assert "about the same" in same and "different voices" not in same


def test_without_alignments_the_choice_of_the_middle_layer_is_explained() -> None:
    (words,) = of_layers({"layers": {str(layer): {"perplexity": 80.0} for layer in range(4)}, "layer": 2})
    assert "Without phone alignments there is nothing to compare the layers by" in words


def test_a_sweep_without_layer_0_has_nothing_to_compare_with() -> None:
    assert of_layers({"layers": {"1": {"pnmi": 0.5}}, "layer": 1}) == []


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([5.0, 4.0, 3.0], "fell from 5.00 to 3.00 and was still falling"),
        ([5.0, 4.0, 3.99], "fell from 5.00 to 3.99 and has levelled off"),
        ([5.0, 4.0, 4.5], "was best at step 20 (4.00) and has risen since to 4.50"),
        ([5.0, 5.0, 4.99], "hardly changed from step 10 on (5.00 to 4.99)"),
        ([5.0], "the training loss went from 9.00 to 9.00, and validation ended at 5.00"),
    ],
)
def test_a_curve_is_read_for_what_it_did(losses: list[float], told: str) -> None:
    lines = [{"step": 10 * (n + 1), "loss": 9.0, "valid_loss": loss} for n, loss in enumerate(losses)]
    (words,) = of_training("pretrain", {"iteration1": lines})
    assert words.startswith("iteration1: ") and told in words
    (words,) = of_training("ctc", {"ctc": lines})
    assert words[0].isupper()


def test_units_worse_than_mfcc_at_abx_are_called_so() -> None:
    units = {"mfcc": {"abx_across": 0.12, "usage": 1.0}, "second": {"abx_across": 0.2, "usage": 0.3}}
    across, used = of_units(units)
    assert (
        across
        == "Across speakers, the units of second are worse than MFCC’s at keeping phones apart: ABX error "
        "20.0% against 12.0%."
    )
    assert used == "Only 30% of the classes of second occur."
    assert of_units({}) == []


def test_recognisers_with_most_words_wrong_or_nothing_written_are_said_to_be_of_no_use_yet() -> None:
    bad = {"wer": 0.93, "counted": "phones", "scored_utterances": 10, "empty_hypotheses": 4}
    useless, empty = of_recognisers({"transcripts": {"pretrained": bad}})
    assert (
        useless.startswith("Most phones are wrong")
        and empty == "pretrained: nothing was written for 4 of 10 utterances."
    )
    assert (
        of_recognisers({"transcripts": {"pretrained": {"wer": 0.2}, "scratch": {"wer": 0.9}}})
        == of_recognisers({})
        == []
    )


def test_the_matrix_is_read_for_clear_units_and_for_phones_without_one() -> None:
    joint = np.array([[90, 0, 0, 0], [0, 60, 30, 0], [10, 40, 20, 0], [0, 0, 50, 0]])
    words = " ".join(of_matrix(PhoneCounts(["sil", "a", "b", "s"], joint, ["sil"])))
    assert "Of the 3 units that occur, 2 have one phone in more than half of their frames." in words
    # silence is no phone to be proud of
    assert "The clearest is unit 1, which is a in 60% of its frames." in words
    assert "No unit is chiefly b." in words


def test_short_splits_and_voices_that_may_be_shared_are_warned_of() -> None:
    assert cautions(counted()) == []
    splits = {**counted()["splits"], "dev": {"hours": 0.02, "utterances": 2, "speakers": 1}}
    (short,) = cautions(counted(splits=splits))
    assert short.startswith("The dev split is only 1.2 minutes long.")
    (unknown,) = cautions(counted(with_speaker=0, speakers=0, held_out=[]))
    assert (
        unknown
        == "The manifest names no speakers, so the voices of the test recordings may have been heard in "
        "training."
    )
    shared, some = cautions(counted(with_speaker=20, held_out=["dev"]))
    assert shared.startswith("Some voices of test may have been heard in training") and some.startswith(
        "10 of 30 utterances"
    )
    (few,) = cautions(counted(with_phones=7))
    assert few.startswith("7 of 30 utterances have phone alignments")


def test_what_a_corpus_lacks_is_named_with_the_way_to_have_it() -> None:
    assert missing(counted()) == []
    phones, text, speakers = missing(counted(with_phones=0, with_text=0, with_speaker=0))
    assert "PNMI" in phones.what and "alignments=" in phones.command and "align" in phones.remedy
    assert "no transcripts" in text.why and "NAME.txt" in text.remedy
    assert "speaker_pattern=" in speakers.command


def test_the_round_trip_is_put_plainly_and_beside_what_it_can_be_compared_with() -> None:
    assert of_sounds({}) == []
    (words,) = of_sounds(
        {
            "frame_agreement_resynthesis": 0.7,
            "frame_agreement_copy": 0.77,
            "frame_agreement_commonest_unit": 0.03,
        }
    )
    assert words.startswith(
        "Units turned into sound and encoded again are the same in 70% of the frames. For comparison: 77% for"
    )
    assert words.endswith("3% for always guessing the commonest unit.")


def test_a_lead_over_the_bigram_that_chance_would_bring_is_not_called_one() -> None:
    lm = {
        "split": "test",
        "bits_per_unit": 4.97,
        "bigram_bits_per_unit": 5.02,
        "trigram_bits_per_unit": 5.05,
        "unigram_bits_per_unit": 6.6,
    }
    summary: dict[str, Any] = {"audio": counted(), "units": {}, "sounds": {}, "ctc": {}, "transfer": {}}
    sure = in_words({**summary, "lm": {**lm, "bits_below_bigram_ci95": [0.01, 0.1]}})
    chance = in_words({**summary, "lm": {**lm, "bits_below_bigram_ci95": [-0.01, 0.1]}})
    assert "The unit language model beats the bigram: 4.97 bits per unit against 5.02" in " ".join(sure)
    assert "The unit language model is not certainly better than a bigram: 4.97 bits" in " ".join(chance)


def test_the_first_numbers_are_those_that_there_are() -> None:
    empty: dict[str, Any] = {"audio": counted(speakers=0), "units": {}, "lm": {}, "ctc": {}}
    assert glance(empty) == [("3.0 hours", "of speech, 30 utterances")]
    ctc = {"transcripts": {"pretrained": {"wer": 0.25, "counted": "phones"}}}
    full = {
        **empty,
        "audio": counted(),
        "units": {"second": {"units_per_second": 20.0, "num_classes": 100, "pnmi": 0.5}},
        "ctc": ctc,
    }
    assert [value for value, _ in glance(full)] == ["3.0 hours", "9", "20.0", "0.500", "25%"]


def test_rates_of_units_and_phones_are_one_sentence_each() -> None:
    assert (
        of_rates({"mfcc": 30.0}, 12.0)
        == "Here the unit changes 30.0 times a second (mfcc). There are 12.0 phones a second."
    )
    assert of_rates({"mfcc": 30.0}, None) == "Here the unit changes 30.0 times a second (mfcc)."


def test_durations_are_in_units_that_one_would_say() -> None:
    hours = (12.34, 1.0, 0.5166, 0.1, 1 / 60, 0.01)
    assert [spoken_time(value) for value in hours] == [
        "12.3 hours",
        "1.0 hours",
        "31 minutes",
        "6.0 minutes",
        "1.0 minutes",
        "36 seconds",
    ]


def test_differences_too_small_to_mean_anything_are_called_none() -> None:
    assert [compare(value, 0.5, "less", "same", "more") for value in (0.4, 0.499, 0.501, 0.6)] == [
        "less",
        "same",
        "same",
        "more",
    ]
