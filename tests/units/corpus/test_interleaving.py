from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.utterance import Utterance
from tests.units.spoken import at
from units.corpus.interleaving import deinterleave, draw_written, interleave, interleaved_document
from units.corpus.text import TextConfig, TextPieces
from units.corpus.vocabulary import Vocabulary

K = 5
PIECES = TextPieces.learn({"aba": 4, "bac": 4, "cab": 2, "a": 1}, 8)
VOCABULARY = Vocabulary(num_units=K, text=PIECES.pieces, layout="interleaved")
SPEECH, TEXT = VOCABULARY.speech_marker, VOCABULARY.text_marker
# Some words last no frame, some pauses neither; times may go on after the last frame.
spoken = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 120), st.text("abc", min_size=1, max_size=4), st.booleans()),
    max_size=8,
)


@given(spoken, st.lists(st.integers(0, K - 1), min_size=1, max_size=60), st.booleans())
def test_spans_hold_the_units_and_every_frame_once(
    drawn: list[tuple[int, int, str, bool]], labels: list[int], deduplicated: bool
) -> None:
    words, written = at([row[:3] for row in drawn]), np.array([row[3] for row in drawn], bool)
    frames = np.array(labels, np.uint16)
    symbols, durations = interleave(frames, words, written, PIECES, VOCABULARY, deduplicated=deduplicated)
    spans = deinterleave(symbols, durations, PIECES, VOCABULARY)
    assert durations.sum() == len(frames) and symbols.shape == durations.shape
    assert (
        spans[0].start == 0
        and spans[-1].end == len(frames)
        and all(a.end == b.start for a, b in pairwise(spans))
    )
    assert all(a.modality != b.modality for a, b in pairwise(spans)) and all(
        span.start < span.end for span in spans
    )
    for span in spans:
        assert (span.modality == "text") == bool(span.words)
        if span.modality == "speech":
            np.testing.assert_array_equal(span.frames, frames[span.start : span.end])
            assert (span.units[1:] != span.units[:-1]).all() if deduplicated else (span.durations == 1).all()
    said = iter(word.word for word in words)
    assert all(word in said for span in spans for word in span.words), (
        "written words come in the order they were said in"
    )


@given(
    st.lists(
        st.tuples(
            st.integers(0, 80), st.integers(20, 120), st.sampled_from(["a", "bac", "cab"]), st.booleans()
        )
    )
)
def test_the_words_that_were_drawn_are_written_in_the_place_of_their_frames(
    drawn: list[tuple[int, int, str, bool]],
) -> None:
    """Words of 20 ms and more have a frame each, so none goes with a neighbour. The frames' modality by a
    loop over frames."""
    words, written = at([row[:3] for row in drawn]), np.array([row[3] for row in drawn], bool)
    num_frames = 3 + int(1000 * words[-1].end if words else 0) // 20
    sequence = interleave(np.arange(num_frames) % K, words, written, PIECES, VOCABULARY)
    spans = deinterleave(*sequence, PIECES, VOCABULARY)
    assert [word for span in spans for word in span.words] == [
        word.word for word, is_text in zip(words, written, strict=True) if is_text
    ]
    for frame in range(num_frames):
        centre = frame * 0.02 + 0.0125
        before = [number for number, word in enumerate(words) if word.start <= centre]
        after = [number for number, word in enumerate(words) if word.end > centre]
        # the word it is in (twice), or those around the pause
        sides = [written[number] for number in (before[-1:] + after[:1])]
        (span,) = [span for span in spans if span.start <= frame < span.end]
        assert span.modality == ("text" if sides and all(sides) else "speech")


def test_pauses_belong_to_speech_between_spans_and_to_the_span_within_one() -> None:
    # frames 5..9, 15..19, 25..29, 35..39
    words = at([(100, 100, "a"), (100, 100, "b"), (100, 100, "c"), (100, 100, "a")])
    frames = np.arange(45) % K
    for written, expected in (
        ([0, 1, 1, 0], [("speech", 0, 15), ("text", 15, 30), ("speech", 30, 45)]),
        ([1, 0, 0, 1], [("text", 0, 10), ("speech", 10, 35), ("text", 35, 45)]),
        ([1, 1, 1, 1], [("text", 0, 45)]),
        ([0, 0, 0, 0], [("speech", 0, 45)]),
    ):
        symbols, durations = interleave(frames, words, np.array(written, bool), PIECES, VOCABULARY)
        assert [span[:3] for span in deinterleave(symbols, durations, PIECES, VOCABULARY)] == expected


def test_a_sequence_reads_as_it_is_defined() -> None:
    words = at([(0, 100, "a"), (0, 100, "aba")])
    symbols, durations = interleave(
        np.array([3, 3, 3, 1, 1, 2, 2, 2, 2, 2]), words, np.array([False, True]), PIECES, VOCABULARY
    )
    aba = [K + number for number in PIECES.encode_word("aba")]
    assert symbols.tolist() == [SPEECH, 3, 1, TEXT, *aba] and durations.tolist() == [
        0,
        3,
        2,
        0,
        5,
        *[0] * (len(aba) - 1),
    ]
    assert deinterleave(symbols, durations, PIECES, VOCABULARY)[1].words == ("aba",)
    assert [VOCABULARY.names()[symbol] for symbol in symbols[:4]] == ["<Speech>", "<Un3>", "<Un1>", "<Text>"]


def test_a_word_too_short_for_a_frame_goes_with_its_neighbours() -> None:
    words = at([(0, 100, "a"), (0, 5, "b"), (0, 100, "c")])  # b's 5 ms hold no frame's centre
    frames = np.arange(11) % K
    for written, expected in (([1, 0, 1], [("text", ("a", "b", "c"))]), ([0, 1, 0], [("speech", ())])):
        sequence = interleave(frames, words, np.array(written, bool), PIECES, VOCABULARY)
        assert [
            (span.modality, span.words) for span in deinterleave(*sequence, PIECES, VOCABULARY)
        ] == expected


@pytest.mark.parametrize(("fraction", "span_words"), [(0.5, 8.0), (0.25, 4.0), (0.8, 3.0)])
def test_spans_have_the_fraction_and_length_that_were_asked_for(fraction: float, span_words: float) -> None:
    rng = np.random.default_rng(0)
    written = draw_written(100_000, fraction, span_words, rng)
    # About 100,000 / span_words spans of geometric lengths: 5 % is over four standard errors of both.
    assert written.mean() == pytest.approx(fraction, rel=0.05)
    changes = np.flatnonzero(written[1:] != written[:-1]) + 1
    assert len(written) / (len(changes) + 1) == pytest.approx(span_words, rel=0.05)
    # Short utterances have the fraction too, wherever they are cut.
    assert np.mean([draw_written(3, fraction, span_words, rng).mean() for _ in range(5000)]) == pytest.approx(
        fraction, rel=0.1
    )


def test_what_is_written_follows_from_the_seed_and_the_id() -> None:
    words = at([(0, 100, "a")] * 40)
    frames = np.arange(200) % K
    config = TextConfig(layout="interleaved", span_words=3.0)
    utterance = Utterance("one", "one.wav", 0, 16000, 16000, "train", words=words)

    def symbols(utterance: Utterance, config: TextConfig = config) -> list[int]:
        return list(interleaved_document(utterance, frames, PIECES, VOCABULARY, config).units)

    document = interleaved_document(utterance, frames, PIECES, VOCABULARY, config)
    assert (document.id, document.split) == ("one", "train") and document.durations is not None
    assert document.durations.sum() == 200 and {SPEECH, TEXT} <= set(document.units.tolist())
    assert symbols(utterance) == symbols(utterance) != symbols(replace(utterance, id="two"))
    assert symbols(utterance) != symbols(utterance, config.model_copy(update={"seed": 1}))
    with pytest.raises(ValueError, match="utterance 'one': the word 'zed' has 'd', 'e', 'z'"):
        symbols(replace(utterance, words=at([(0, 100, "zed")] * 40)))


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([], "begins with the marker"),
        ([0, SPEECH], "begins with the marker"),
        ([SPEECH, 0, K], f"symbol 2, {K}, is text in a span of the other"),
        ([TEXT, K + PIECES.encode_word("b")[0], 1], "is speech in a span of the other"),
        ([SPEECH, 1, TEXT, SPEECH], "the span of text at symbol 2 does not begin with a word"),
        ([TEXT, K + PIECES.pieces.index("b")], "the span of text at symbol 0 does not begin with a word"),
    ],
)
def test_what_is_no_interleaved_sequence_is_refused(symbols: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deinterleave(np.array(symbols, np.int64), np.ones(len(symbols), np.int64), PIECES, VOCABULARY)
