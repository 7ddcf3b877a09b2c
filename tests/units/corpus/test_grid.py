import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.utterance import Utterance
from tests.units.spoken import at
from units.corpus.grid import from_grid, grid_document, to_grid
from units.corpus.text import TextConfig, TextPieces, word_frames

PIECES = TextPieces.learn({"aba": 4, "bac": 4, "cab": 2, "a": 1}, 8)
PAD = len(PIECES)
spoken = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 120), st.text("abc", min_size=1, max_size=4)), max_size=8
)


@given(spoken, st.integers(1, 80), st.integers(-20, 20))
def test_every_word_comes_back_and_at_its_start_where_nothing_was_in_the_way(
    drawn: list[tuple[int, int, str]], num_frames: int, delay: int
) -> None:
    words = at(drawn)
    sizes = [len(PIECES.encode_word(word.word)) for word in words]
    if sum(sizes) > num_frames:
        with pytest.raises(ValueError, match=f"{sum(sizes)} pieces of text do not fit {num_frames} frames"):
            to_grid(words, num_frames, PIECES, delay)
        return
    stream = to_grid(words, num_frames, PIECES, delay)
    assert stream.shape == (num_frames,) and (stream != PAD).sum() == sum(sizes)
    back = from_grid(stream, PIECES, delay)
    assert [name for _, name in back] == [word.word for word in words]
    starts = word_frames(words, num_frames)[0]
    ends = starts + sizes
    collides = len(words) and (
        (ends[:-1] > starts[1:]).any() or starts[0] + delay < 0 or (ends[-1] + delay > num_frames)
    )
    if not collides:
        assert [frame for frame, _ in back] == starts.tolist()


def test_pieces_stand_at_the_start_of_their_word() -> None:
    words = at([(100, 200, "a"), (100, 200, "c")])  # frames 5 and 20
    a, c = PIECES.encode_word("a"), PIECES.encode_word("c")
    for delay in (0, 3, -4):
        stream = to_grid(words, 40, PIECES, delay)
        expected = np.full(40, PAD)
        expected[5 + delay :][: len(a)], expected[20 + delay :][: len(c)] = a, c
        np.testing.assert_array_equal(stream, expected)
        assert from_grid(stream, PIECES, delay) == [(5, "a"), (20, "c")]


def test_a_word_in_the_way_pushes_the_next_and_the_end_pulls_the_last() -> None:
    pieces = TextPieces.learn({"abc": 1})
    words = at([(0, 20, "abc"), (0, 100, "b"), (200, 20, "cab")])  # frames 0, 1 and 16
    assert from_grid(to_grid(words, 40, pieces), pieces) == [(0, "abc"), (4, "b"), (16, "cab")]
    assert from_grid(to_grid(words, 18, pieces), pieces) == [(0, "abc"), (4, "b"), (14, "cab")]
    assert from_grid(to_grid(words, 10, pieces), pieces) == [(0, "abc"), (4, "b"), (6, "cab")]
    with pytest.raises(ValueError, match="10 pieces of text do not fit 9 frames; learn longer ones"):
        to_grid(words, 9, pieces)


def test_a_document_has_text_beside_its_levels() -> None:
    utterance = Utterance("u", "u.wav", 0, 16000, 16000, "dev", words=at([(100, 200, "A")]))
    config = TextConfig(layout="grid", delay=2)
    for frames in (np.arange(20, dtype=np.uint16) % 7, np.arange(40, dtype=np.uint16).reshape(20, 2) % 7):
        document = grid_document(utterance, frames, PIECES, config)
        assert document.id == "u" and document.split == "dev" and document.durations is not None
        assert document.units.shape == (20, 1 + frames.size // 20) and document.durations.tolist() == [1] * 20
        np.testing.assert_array_equal(document.units[:, 1:].reshape(frames.shape), frames)
        assert from_grid(document.units[:, 0], PIECES, 2) == [(5, "a")]
    with pytest.raises(ValueError, match="utterance 'u': .* do not fit 1 frames"):
        grid_document(utterance, np.zeros(1, np.uint16), TextPieces.learn({"a": 1}), config)


def test_a_stream_that_begins_within_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="has 'b' at frame 1 before any word begins"):
        from_grid(np.array([PAD, PIECES.pieces.index("b")]), PIECES)
    assert from_grid(np.full(5, PAD), PIECES) == []
