import sys
import unicodedata
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import parse_config
from pretrain.ctc.text import TextConfig
from pretrain.data.utterance import Phone, Utterance

SETTINGS = [
    TextConfig(case=case, punctuation=marks)
    for case, marks in product(["lower", "upper", "keep"], ["remove", "keep"])
]  # type: ignore[arg-type]


def utterance(**columns: Any) -> Utterance:
    return Utterance("u", "u.wav", 0, 16000, 16000, **columns)


def assert_normal(config: TextConfig, text: str) -> None:
    normal = config.normalize(text)
    assert (
        unicodedata.is_normalized("NFC", normal) and " ".join(normal.split()) == normal and "|" not in normal
    ), repr(text)
    assert config.normalize(normal) == normal, repr(text)


@given(
    st.text(max_size=20) | st.text("aİßΣe\u0301\u200b\u200d'’‘·״|- \u1100\u1161\u11a8가", max_size=12),
    st.sampled_from(SETTINGS),
)
def test_normalised_text_is_a_fixed_point_in_nfc_with_single_spaces(text: str, config: TextConfig) -> None:
    assert_normal(config, text)


@pytest.mark.parametrize("config", [TextConfig(), TextConfig(case="upper", punctuation="keep")])
def test_normalisation_is_a_fixed_point_for_every_character_of_unicode(config: TextConfig) -> None:
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)
        # ideographs and the like: nothing is done to them
        plain = category == "Lo" and not unicodedata.decomposition(character)
        if not plain and category not in ("Cn", "Cs", "Co"):
            assert_normal(config, f"b{character}\u0301'")


def test_the_same_word_in_two_unicode_forms_is_one() -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    assert TextConfig().normalize(composed) == TextConfig().normalize(decomposed) == "caf\u00e9"
    greek = TextConfig(case="upper")  # the iota below becomes a letter, whatever mark is written before it
    assert greek.normalize("\u03b1\u0345\u0301") == greek.normalize("\u03b1\u0301\u0345") == "\u0386\u0399"
    # something invisible between the letter and its accent
    assert TextConfig().normalize("e\u200b\u0301") == "\u00e9"


def test_case_and_punctuation_follow_the_config() -> None:
    assert TextConfig().normalize("Well-known: don't  STOP! (“now”)") == "well known don't stop now"
    assert TextConfig(case="upper").normalize("don't") == "DON'T"
    assert TextConfig(case="keep", punctuation="keep").normalize(" A, b|c.") == "A, b c."


def test_the_case_is_that_of_no_language() -> None:
    # Turkish would have dotless ı, and i
    assert TextConfig().normalize("DIYARBAKIR İ") == "diyarbakir i\u0307"
    assert (
        TextConfig().normalize("ΟΔΟΣ") == "οδος" and TextConfig(case="upper").normalize("Straße") == "STRASSE"
    )


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("’tis the dogs’ tail, don’t", "'tis the dogs' tail don't"),  # as in LibriSpeech
        ("‘Don’t,’ she said, ‘so’.", "don't she said so"),
        ("a ' b '' c", "a b c"),
        ("п’ять пʼять п'ять", "п'ять п'ять п'ять"),
        ("col·legi · a·", "col·legi a"),
        ("צה״ל אמר ״לא״", "צה״ל אמר לא"),
        ("co\u00adop\ufeff", "coop"),
        ("नमस्ते।", "नमस्ते"),
        ("مرحبا، كيف؟", "مرحبا كيف"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian's joiner is spelling
        ("👩\u200d👩 $5 + 5%", "👩\u200d👩 $5 + 5"),  # symbols are no punctuation; % is, to Unicode
        ("안녕하세요!", "안녕하세요"),
        ("?!", ""),
    ],
)
def test_punctuation_goes_and_what_belongs_to_words_stays(raw: str, normal: str) -> None:
    assert TextConfig().normalize(raw) == normal


def test_punctuation_that_is_kept_still_has_one_apostrophe_and_nothing_unseen() -> None:
    assert (
        TextConfig(punctuation="keep").normalize("“Don’t…” \u200e(well-\u00adknown)")
        == "“don't…” (well-known)"
    )


def test_targets_of_phones_leave_out_silences_and_keep_each_phone_one() -> None:
    phones = [
        Phone(0.0, 0.1, "SIL"),
        Phone(0.1, 0.2, "HH"),
        Phone(0.2, 0.3, "a b"),
        Phone(0.3, 0.4, "e\u0301"),
        Phone(0.4, 0.5, ""),
    ]
    text = TextConfig(spelling="phones")
    assert text.target(utterance(phones=phones, text="x")) == "HH a_b \u00e9"
    assert text.target(utterance()) == text.target(utterance(phones=[])) == ""
    assert TextConfig(spelling="phones", silence=("HH",)).target(utterance(phones=phones[:2])) == "SIL"


def test_targets_of_text_are_normalised_and_empty_where_there_is_none() -> None:
    assert TextConfig().target(utterance(text="A!")) == "a" and TextConfig().target(utterance()) == ""


def test_a_tokenizer_is_given_where_and_only_where_one_spells() -> None:
    with pytest.raises(ValueError, match='spelling = "tokenizer" needs `tokenizer`'):
        parse_config(TextConfig, {"spelling": "tokenizer"}, "a.toml")
    with pytest.raises(ValueError, match="spelling is 'characters'; set spelling"):
        parse_config(TextConfig, {"tokenizer": "tokenizer.json"}, "a.toml")
