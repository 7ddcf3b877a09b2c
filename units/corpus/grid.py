"""Text on the frame grid: a stream of pieces beside the units, one symbol a frame (Moshi's inner monologue;
Défossez et al., 2024).

A word's pieces stand one a frame from the frame of its start, or `delay` frames later; elsewhere the stream
has PAD. A word that comes before the one ahead of it is spelled out waits; what would then not be done by the
last frame comes earlier. No word is lost, and their order never changes.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pretrain.data.utterance import Utterance, Word
from units.corpus.corpus_writing import Document
from units.corpus.text import WORD, TextConfig, TextPieces, spoken_words, word_frames


def to_grid(words: Sequence[Word], num_frames: int, pieces: TextPieces, delay: int = 0) -> np.ndarray:
    """The text stream, int64 (num_frames,); PAD is `len(pieces)`. ValueError if there are more pieces than
    frames.

    A delayed start that lies outside the recording is its first frame, or as late as leaves room.
    """
    spelled = [pieces.encode_word(word.word) for word in words]
    if (total := sum(map(len, spelled))) > num_frames:
        raise ValueError(
            f"{total} pieces of text do not fit {num_frames} frames; learn longer ones, or leave the "
            "utterance out"
        )
    starts, _ = word_frames(words, num_frames)
    places: list[int] = []
    free = 0
    for wanted, word in zip((starts + delay).tolist(), spelled, strict=True):
        places.append(max(wanted, free))
        free = places[-1] + len(word)
    stream = np.full(num_frames, len(pieces), np.int64)
    free = num_frames
    for place, word in zip(reversed(places), reversed(spelled), strict=True):
        free = min(place, free - len(word))
        stream[free : free + len(word)] = word
    return stream


def from_grid(stream: np.ndarray, pieces: TextPieces, delay: int = 0) -> list[tuple[int, str]]:
    """(frame, word) of each word, in order: all that `to_grid` was given, at the frame of their start where
    they did not have to move.

    A stream whose first piece is within a word is a ValueError.
    """
    places = np.flatnonzero(stream != len(pieces))
    opens = [pieces.pieces[number].startswith(WORD) for number in stream[places]]
    if opens and not opens[0]:
        raise ValueError(
            f"the text stream has {pieces.pieces[stream[places[0]]]!r} at frame {places[0]} before any word "
            "begins"
        )
    bounds = [*np.flatnonzero(opens).tolist(), len(places)]
    return [
        (int(places[first]) - delay, pieces.decode(stream[places[first:last]]))
        for first, last in pairwise(bounds)
    ]


def grid_document(
    utterance: Utterance, frames: np.ndarray, pieces: TextPieces, config: TextConfig
) -> Document:
    """An utterance's labels per frame, (frames,) or (frames, levels), and words as a document (frames, 1 +
    levels), text first.

    Errors: ValueError naming the utterance: without word times, with a character that the pieces lack, or
    with too much text.
    """
    words = spoken_words(utterance, config)
    try:
        stream = to_grid(words, len(frames), pieces, config.delay)
    except ValueError as error:
        raise ValueError(f"utterance {utterance.id!r}: {error}") from None
    return Document(
        utterance.id,
        utterance.split,
        np.column_stack([stream, frames.astype(np.int64)]),
        np.ones(len(frames), np.int64),
    )
