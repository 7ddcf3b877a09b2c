from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import parse_config
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import Phone, Utterance, Word, phone_frames
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.text import (
    WORD,
    TextConfig,
    TextPieces,
    count_words,
    learn_pieces,
    spoken_words,
    word_frames,
)
from units.corpus.vocabulary import Vocabulary

CONFIG = TextConfig(layout="interleaved")
COUNTS = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3, "new": 1})


def utterance(words: list[tuple[float, float, str]] | None) -> Utterance:
    return Utterance(
        "u", "u.wav", 0, 16000, 16000, words=None if words is None else [Word(*word) for word in words]
    )


# Pieces


@given(
    st.dictionaries(st.text("abcdé'", min_size=1, max_size=6), st.integers(1, 9), min_size=1),
    st.integers(0, 20) | st.none(),
)
@settings(max_examples=50)
def test_spelling_is_lossless_and_made_of_pieces(counts: dict[str, int], more: int | None) -> None:
    alphabet = {WORD, *"".join(counts)}
    pieces = TextPieces.learn(counts, None if more is None else len(alphabet) + more)
    assert set(pieces.pieces) >= alphabet and len(pieces) == len(set(pieces.pieces)) <= len(alphabet) + (
        more or 0
    )
    text = " ".join(counts)
    assert pieces.decode(pieces.encode(text)) == text
    assert all(pieces.pieces[pieces.encode_word(word)[0]].startswith(WORD) for word in counts)
    assert all(WORD not in piece[1:] for piece in pieces.pieces), "a piece never spans two words"


def test_spelling_is_that_of_the_tokenizer_which_learnt_the_pieces() -> None:
    """The pieces alone give the splits that `tokenizers` makes with its list of merges."""
    from tokenizers import Tokenizer, models, trainers

    rng = np.random.default_rng(0)
    syllables = ["ba", "na", "ki", "to", "le", "sh", "ou"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        [WORD + word for word in words], trainers.BpeTrainer(vocab_size=60, min_frequency=2)
    )
    pieces = TextPieces.learn(Counter(words), 60)
    assert set(pieces.pieces) == tokenizer.get_vocab().keys() and len(pieces) == 60
    for word in words:
        assert [pieces.pieces[number] for number in pieces.encode_word(word)] == tokenizer.encode(
            WORD + word
        ).tokens


def test_learning_does_not_depend_on_the_order_of_words() -> None:
    orders = [COUNTS, dict(reversed(COUNTS.items()))]
    assert len({TextPieces.learn(counts, 20).pieces for counts in orders}) == 1


def test_bpe_joins_the_most_frequent_neighbours_first() -> None:
    """Sennrich et al. (2016), algorithm 1: "e s" occurs 9 times, then "es t" 9 times; "l o" 7 times, "lo w" 7
    times."""
    alphabet = len({WORD, *"".join(COUNTS)})
    learnt = TextPieces.learn(COUNTS, alphabet + 4).pieces[alphabet:]
    assert {"es", "est"} <= set(learnt)


def test_an_unknown_character_is_an_error_that_names_the_word() -> None:
    pieces = TextPieces.learn(COUNTS)
    with pytest.raises(ValueError, match=r"the word 'zoë' has 'z', 'ë', for which there are no text pieces"):
        pieces.encode_word("zoë")
    with pytest.raises(ValueError, match=f"the word 'l{WORD}w' has '{WORD}'"):
        pieces.encode_word(f"l{WORD}w")
    with pytest.raises(ValueError, match=r"5 text pieces are too few: the words have 10 characters"):
        TextPieces.learn(COUNTS, 5)


# Words


def test_words_are_normalised_like_transcripts() -> None:
    words = spoken_words(
        utterance([(0.0, 0.3, "Don’t,"), (0.3, 0.4, "—"), (0.4, 1.3, "Well-known"), (1.3, 1.5, "I")]), CONFIG
    )
    assert [word.word for word in words] == ["don't", "well", "known", "i"]
    assert [time for word in words for time in word[:2]] == pytest.approx(
        [0, 0.3, 0.4, 0.8, 0.8, 1.3, 1.3, 1.5]
    )
    kept = TextConfig(layout="grid", case="keep", punctuation="keep")
    assert [word.word for word in spoken_words(utterance([(0.0, 0.3, "Don't,")]), kept)] == ["Don't,"]
    with pytest.raises(ValueError, match=r"utterance 'u' has no word times; index it again with `words`"):
        spoken_words(utterance(None), CONFIG)


times = st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), max_size=8)


@given(times, st.integers(1, 60))
def test_words_have_the_frames_that_phones_would_have(
    gaps: list[tuple[float, float]], num_frames: int
) -> None:
    edges = np.cumsum(np.array(gaps).ravel())
    words = [Word(float(start), float(end), str(i)) for i, (start, end) in enumerate(edges.reshape(-1, 2))]
    starts, ends = word_frames(words, num_frames)
    of_word = np.full(num_frames, "", dtype="U2")
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        of_word[start:end] = str(i)
    np.testing.assert_array_equal(of_word, phone_frames([Phone(*word) for word in words], num_frames))


def test_words_that_overlap_by_rounding_share_no_frame() -> None:
    # frame 6 is centred on 132.5 ms
    starts, ends = word_frames([Word(0.0, 0.1333, "a"), Word(0.1325, 0.3, "b")], 15)
    assert starts.tolist() == [0, 6] and ends.tolist() == [6, 15]


# Manifests


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    def row(name: str, split: str, *words: str) -> dict[str, Any]:
        listed = [(0.1 * i, 0.1 * (i + 1), word) for i, word in enumerate(words)]
        sizes = {"start": 0, "num_samples": 16000, "sample_rate": 16000}
        return {"id": name, "path": f"/{name}.wav", **sizes, "split": split, "words": listed}

    write_manifest(
        tmp_path,
        [row("a", "train", "The", "the", "cat"), row("b", "test", "the", "qat"), row("c", "test")],
        {},
        {},
    )
    return Manifest(tmp_path)


def test_pieces_are_learnt_from_the_train_split_and_cover_every_character(manifest: Manifest) -> None:
    assert count_words(manifest, TextConfig(layout="grid", pieces=9)) == {"the": 2, "cat": 1, "qat": 0}
    assert count_words(manifest, TextConfig(layout="grid")) == {"the": 3, "cat": 1, "qat": 1}
    pieces = learn_pieces(manifest, TextConfig(layout="grid", pieces=9))
    assert "q" in pieces.pieces and len(pieces) == 9 and pieces.decode(pieces.encode("the qat")) == "the qat"
    assert learn_pieces(manifest, TextConfig(layout="grid")).pieces == tuple("acehqt▁")
    with pytest.raises(ValueError, match="6 text pieces are too few"):
        learn_pieces(manifest, TextConfig(layout="grid", pieces=6))
    with pytest.raises(ValueError, match="no utterances of split 'dev'; it has test, train"):
        learn_pieces(manifest, TextConfig(layout="grid", pieces=9, split="dev"))


def test_utterances_without_words_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    sizes = {"start": 0, "num_samples": 16000, "sample_rate": 16000}
    rows = [
        {"id": name, "path": f"/{name}.wav", **sizes, "words": [(0.0, 1.0, "a")] if name == "a" else None}
        for name in "abc"
    ]
    write_manifest(tmp_path, rows, {}, {})
    with pytest.raises(
        ValueError, match=r"and 2 of 3 utterances have none, first 'b'; index again with `words`"
    ):
        learn_pieces(Manifest(tmp_path), CONFIG)
    write_manifest(tmp_path / "silent", [rows[0] | {"words": []}], {}, {})
    with pytest.raises(ValueError, match="there is not one word in it"):
        learn_pieces(Manifest(tmp_path / "silent"), CONFIG)


def test_pieces_may_be_those_of_another_corpus(manifest: Manifest, tmp_path: Path) -> None:
    def corpus(name: str, vocabulary: Vocabulary) -> str:
        symbols, folder = np.zeros(3, np.int64), str(tmp_path / name)
        document = Document("d", None, symbols, symbols + 1)
        write_corpus(
            folder,
            [document],
            {},
            {},
            vocabulary=vocabulary,
            codebook="c",
            frame_rate_hz=50.0,
            deduplicated=True,
        )
        return folder

    learnt = TextPieces.learn({"cathquext": 2}, 12)
    folder = corpus("one", Vocabulary(num_units=2, text=learnt.pieces, layout="interleaved"))
    assert learn_pieces(manifest, TextConfig(layout="grid", pieces_of=folder)).pieces == learnt.pieces
    folder = corpus("two", Vocabulary(num_units=2, text=tuple("aceht▁"), layout="interleaved"))
    with pytest.raises(
        ValueError, match=f"{manifest.folder}: the word 'qat' has 'q', for which there are no text pieces"
    ):
        learn_pieces(manifest, TextConfig(layout="grid", pieces_of=folder))
    with pytest.raises(ValueError, match="three: this unit corpus has no text"):
        learn_pieces(manifest, TextConfig(layout="grid", pieces_of=corpus("three", Vocabulary(num_units=2))))
    with pytest.raises(
        ValueError, match="`pieces_of` a corpus leaves none to learn; drop `pieces` and `split`"
    ):
        TextConfig(layout="grid", pieces_of=folder, pieces=9)


def test_spans_that_cannot_hold_a_word_are_refused() -> None:
    tree = {"layout": "interleaved", "fraction": 0.95, "span_words": 2.0}
    with pytest.raises(
        ValueError,
        match=r"pack.toml: fraction 0.95 with span_words 2.0 makes the spans of one kind 0.20 words long",
    ):
        parse_config(TextConfig, tree, "pack.toml")
    assert parse_config(TextConfig, {"layout": "grid", "pieces": 100}, "x").pieces == 100
    with pytest.raises(ValueError, match="pieces"):
        parse_config(TextConfig, {"layout": "grid", "pieces": "words"}, "x")
