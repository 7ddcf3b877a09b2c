import json
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary, collapse

CORPUS = [
    "hello world the cat",
    "the dog said: don't!",
    "low lower lowest",
    "żółć naïve 안녕하세요",
    "a 🙂 b",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def sentencepiece(model: Any, trainer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=70, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "bpe": lambda: sentencepiece(models.BPE(), trainers.BpeTrainer),
    "unigram": lambda: sentencepiece(models.Unigram(), trainers.UnigramTrainer, unk_token="<unk>"),
    "word-piece": word_piece,
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The vocabulary of a tokenizer whose file is gone."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    vocabulary = Vocabulary.of([], TextConfig(spelling="tokenizer", tokenizer=str(path)))
    path.unlink()
    return Vocabulary.from_meta(json.loads(json.dumps(vocabulary.to_meta())))


TEXTS = st.text("ab'z é\u0301żहिन्दीّمé👩\u200d🙂가각각ㅋ", max_size=16) | st.text(max_size=12)


@given(TEXTS, st.sampled_from(["characters", "jamo"]), st.sampled_from(["remove", "keep"]))
def test_any_transcript_survives_encoding_and_decoding(text: str, spelling: Any, punctuation: Any) -> None:
    config = TextConfig(spelling=spelling, punctuation=punctuation)
    text = config.normalize(text)
    vocabulary = Vocabulary.of([text], config)
    assert not vocabulary.unknown(text)
    classes = vocabulary.encode(text)
    assert classes.dtype == np.int64 and (
        not len(classes) or (classes.min() >= 1 and classes.max() < len(vocabulary))
    )
    assert vocabulary.decode(classes) == text
    assert vocabulary.decode(collapse(np.repeat(np.insert(classes, range(len(classes)), 0), 3))) == text
    assert [word for word, _, _ in vocabulary.words(classes)] == text.split()
    assert Vocabulary.from_meta(json.loads(json.dumps(vocabulary.to_meta()))) == vocabulary


@given(st.lists(st.integers(1, 9), max_size=12), st.sampled_from(["characters", "jamo"]))
def test_any_sequence_of_classes_decodes_to_normal_text_and_to_its_words(
    numbers: list[int], spelling: Any
) -> None:
    # a final before any vowel, …
    vocabulary = Vocabulary(["ᄀ", "ᄁ", "ᅡ", "ᅩ", "ᆨ", "|", "e", "\u0301", "ㅋ"], spelling)
    text = vocabulary.decode(numbers)
    assert unicodedata.is_normalized("NFC", text) and text == " ".join(text.split())
    assert [word for word, _, _ in vocabulary.words(numbers)] == text.split()
    assert all(
        vocabulary.decode(numbers[first:last]) == word for word, first, last in vocabulary.words(numbers)
    )


def test_a_symbol_is_a_code_point() -> None:
    assert Vocabulary.of(["हिन्दी"], TextConfig()).symbols == sorted({"ह", "ि", "न", "्", "द", "ी"})
    assert Vocabulary.of(["안녕 하"], TextConfig()).symbols == ["|", "녕", "안", "하"]
    assert len(Vocabulary.of(["👩\u200d👩"], TextConfig()).encode("👩\u200d👩")) == 3


def test_jamo_take_syllables_apart_and_leave_the_rest() -> None:
    text = TextConfig(spelling="jamo")
    vocabulary = Vocabulary.of(["각 café ㅋ"], text)
    assert vocabulary.symbols == sorted(["ᄀ", "ᅡ", "ᆨ", "|", "c", "a", "f", "é", "ㅋ"])
    spelled = [vocabulary.symbols[number - 1] for number in vocabulary.encode("각 가")]
    assert spelled == ["ᄀ", "ᅡ", "ᆨ", "|", "ᄀ", "ᅡ"]  # a first and a last ㄱ are two symbols
    assert vocabulary.unknown("강 b") == {"ᆼ", "b"} and vocabulary.words(vocabulary.encode("각 가")) == [
        ("각", 0, 3),
        ("가", 4, 6),
    ]
    assert Vocabulary.given("각 ", text).symbols == ["ᄀ", "ᅡ", "ᆨ", "|"]


def test_every_syllable_of_korean_is_spelled_with_67_jamo() -> None:
    syllables = "".join(map(chr, range(0xAC00, 0xD7A4)))
    vocabulary = Vocabulary.of([syllables], TextConfig(spelling="jamo"))
    assert (
        len(vocabulary) == 1 + 19 + 21 + 27 and vocabulary.decode(vocabulary.encode(syllables)) == syllables
    )


def test_phones_are_words_of_one_symbol() -> None:
    text = TextConfig(spelling="phones")
    vocabulary = Vocabulary.of(["HH AH", "", "AH |"], text)
    assert vocabulary.symbols == ["AH", "HH", "|"] and vocabulary.space is None
    assert vocabulary.encode("HH AH |").tolist() == [2, 1, 3] and vocabulary.decode([2, 1, 3]) == "HH AH |"
    assert vocabulary.words(np.array([2, 1])) == [("HH", 0, 1), ("AH", 1, 2)]
    assert vocabulary.unknown("HH X") == {"X"} and vocabulary.encode("").shape == (0,)
    assert Vocabulary.given("HH  AH HH", text).symbols == ["HH", "AH"]
    with pytest.raises(ValueError, match=r"\['SIL'\] are among text.silence"):
        Vocabulary.given("SIL AH", text)


def test_greedy_paths_lose_repeats_and_blanks_and_text_has_single_spaces() -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    for path, text in (
        ([], ""),
        ([0, 0], ""),
        ([1, 1, 2], "ab"),
        ([1, 0, 1], "aa"),
        ([0, 1, 1, 0, 0, 1, 3, 2, 2], "aa b"),
        ([3, 1, 3], "a"),
        ([1, 3, 0, 3, 2], "a b"),
    ):
        assert vocabulary.decode(collapse(np.array(path, dtype=np.int64))) == text


def test_words_know_which_classes_they_are_made_of() -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    assert vocabulary.words([3, 1, 2, 3, 3, 1]) == [("ab", 1, 3), ("a", 5, 6)]
    assert vocabulary.words([]) == vocabulary.words([3, 3]) == []
    assert Vocabulary(["a", "b"]).words([1, 2]) == [("ab", 0, 2)]  # no space in the vocabulary


def test_given_characters_are_each_once_in_their_order_and_composed() -> None:
    assert Vocabulary.given("dcbaa e\u0301", TextConfig()).symbols == ["d", "c", "b", "a", "|", "\u00e9"]
    assert Vocabulary.given(" ab'\t", TextConfig()).symbols == ["|", "a", "b", "'"]
    assert Vocabulary.given("a|B-", TextConfig(case="keep", punctuation="keep")).symbols == [
        "a",
        "|",
        "B",
        "-",
    ]
    assert Vocabulary.given("\u094dह", TextConfig()).symbols == ["\u094d", "ह"]


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("", "characters: is empty; leave it out"),
        (
            "abCD-",
            r"\['-', 'C', 'D'\] are in no transcript after text.case = 'lower' and text.punctuation = "
            r"'remove'",
        ),
        ("aß", None),
    ],
)
def test_given_characters_that_no_transcript_has_are_refused(characters: str, message: str | None) -> None:
    if message is None:
        assert Vocabulary.given(characters, TextConfig()).symbols == ["a", "ß"]
    else:
        with pytest.raises(ValueError, match=message):
            Vocabulary.given(characters, TextConfig())


def test_a_tokenizers_pieces_are_the_vocabulary_but_for_special_tokens(pieces: Vocabulary) -> None:
    assert not set(SPECIAL) & set(pieces.symbols) and len(pieces) > 30 and pieces.space is None
    for text in ("the cat", "hello lower dog", "said"):
        classes = pieces.encode(text)
        assert pieces.decode(classes) == text and not pieces.unknown(text) and len(classes) > 1
        assert [word for word, _, _ in pieces.words(classes)] == text.split()
    assert pieces.encode("").tolist() == [] and pieces.decode([]) == "" and pieces.words([]) == []


@settings(max_examples=60)
@given(st.data())
def test_a_tokenizer_decodes_any_sequence_of_classes_to_words_that_cover_it(
    pieces: Vocabulary, data: st.DataObject
) -> None:
    numbers = data.draw(st.lists(st.integers(1, len(pieces) - 1), max_size=10))
    text = pieces.decode(numbers)
    words = pieces.words(numbers)
    assert [word for word, _, _ in words] == text.split()
    assert all(0 <= first < last <= len(numbers) for _, first, last in words)
    assert all(a[1] <= b[1] and a[2] <= b[2] for a, b in pairwise(words))


def test_pieces_of_words_are_found_where_characters_are_several_pieces(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.of_tokenizer(tmp_path / "tokenizer.json")
    classes = vocabulary.encode("a 🙃 b")  # a, space and four bytes, space and b
    spans = {word: vocabulary.decode(classes[first:last]) for word, first, last in vocabulary.words(classes)}
    assert spans == {"a": "a", "🙃": "🙃", "b": "b"} and vocabulary.words(classes)[-1][2] == len(classes)
    assert not vocabulary.unknown("anything \u2603 at all 漢")  # bytes spell it
    assert "\ufffd" in vocabulary.decode(classes[:3])


@pytest.mark.parametrize("name", ["bpe", "unigram", "word-piece"])
def test_what_a_tokenizer_cannot_spell_is_told(tmp_path: Path, name: str) -> None:
    TOKENIZERS[name]().save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.of_tokenizer(tmp_path / "tokenizer.json")
    assert not vocabulary.unknown("the cat")
    assert any("☃" in part for part in vocabulary.unknown("the ☃ cat"))
    if name != "bpe":  # which leaves out what it does not know, without a word
        with pytest.raises(KeyError, match="the ☃ cat"):
            vocabulary.encode("the ☃ cat")


def test_special_tokens_in_a_transcript_are_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.of_tokenizer(tmp_path / "tokenizer.json")
    assert vocabulary.decode(vocabulary.encode("the <s> <mask> cat")) == "the <s> <mask> cat"


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}: (no such tokenizer|not a Hugging Face tokenizer.json)"):
        Vocabulary.of([], TextConfig(spelling="tokenizer", tokenizer=str(path)))


def test_a_tokenizer_with_nothing_but_special_tokens_and_characters_beside_one_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="has no pieces but special tokens"):
        Vocabulary.of_tokenizer(path)
    with pytest.raises(ValueError, match="drop `characters`"):
        Vocabulary.given("ab", TextConfig(spelling="tokenizer", tokenizer=str(path)))
