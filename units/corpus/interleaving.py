"""Speech and text taking turns in one sequence: [SPEECH] u u u [TEXT] t t [SPEECH] ... (Spirit LM; Nguyen et
al., 2024).

Spans change at words. A pause between two spans is the speech's; a pause within a span, or at an end of the
utterance, is that span's. So every frame belongs to one span: durations of a speech span are its units', the
frames of a text span lie on its first piece, and markers and other pieces last 0 frames.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.utterance import Utterance, Word
from units.corpus.corpus_writing import Document
from units.corpus.sequence import deduplicate, expand
from units.corpus.text import WORD, TextConfig, TextPieces, spoken_words, word_frames
from units.corpus.vocabulary import Vocabulary


class Span(NamedTuple):
    """Frames start .. end as one modality has them: units with their durations in frames, or words."""

    modality: Literal["speech", "text"]
    start: int
    end: int
    units: np.ndarray  # (units,), none in a text span
    durations: np.ndarray  # (units,)
    words: tuple[str, ...]  # none in a speech span

    @property
    def frames(self) -> np.ndarray:
        """The labels per frame of a speech span, (end - start,)."""
        return expand(self.units, self.durations)


def draw_written(num_words: int, fraction: float, span_words: float, rng: np.random.Generator) -> np.ndarray:
    """Which words are written, (num_words,) bool: `fraction` of them on average, in spans of geometrically
    distributed lengths.

    Written spans have 2 · span_words · fraction words on average, spoken ones 2 · span_words · (1 -
    fraction), before the utterance's ends cut the first and the last.
    """
    stops = {True: 1 / (2 * span_words * fraction), False: 1 / (2 * span_words * (1 - fraction))}
    written = np.empty(num_words, bool)
    now = False
    for word, drawn in enumerate(rng.random(num_words)):
        # the first as in the middle of a long text
        now = bool(drawn < fraction) if word == 0 else now != (drawn < stops[now])
        written[word] = now
    return written


def interleave(
    frames: np.ndarray,
    words: Sequence[Word],
    written: np.ndarray,
    pieces: TextPieces,
    vocabulary: Vocabulary,
    *,
    deduplicated: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and the frames each lasts, int64 (symbols,) both, of labels per frame (frames,) and words, some
    of them written.

    A span that would have no frame, of words too short for one, goes to its neighbour.
    """
    assert vocabulary.text == pieces.pieces and len(words) == len(written)
    symbols: list[np.ndarray] = []
    durations: list[np.ndarray] = []
    for is_text, start, end, first, last in _spans(words, written.copy(), len(frames)):
        if is_text:
            spelled = [
                vocabulary.num_units + number
                for word in words[first:last]
                for number in pieces.encode_word(word.word)
            ]
            symbols.append(np.array([vocabulary.text_marker, *spelled]))
            durations.append(np.array([0, end - start] + [0] * (len(spelled) - 1)))
        else:
            spoken = frames[start:end]
            units, lengths = deduplicate(spoken) if deduplicated else (spoken, np.ones(len(spoken), np.int64))
            symbols.append(np.concatenate([[vocabulary.speech_marker], units]))
            durations.append(np.concatenate([[0], lengths]))
    return np.concatenate(symbols).astype(np.int64), np.concatenate(durations).astype(np.int64)


def _spans(
    words: Sequence[Word], written: np.ndarray, num_frames: int
) -> list[tuple[bool, int, int, int, int]]:
    """(is text, first frame, frame after the last, first word, word after the last) of each span. Changes
    `written`."""
    starts, ends = word_frames(words, num_frames)
    while True:
        changes = np.flatnonzero(written[1:] != written[:-1]) + 1
        cuts = [int(starts[word] if written[word] else ends[word - 1]) for word in changes]
        kinds = [bool(written[word]) for word in [0, *changes][: len(words)]] or [False]
        edges, bounds = [0, *cuts, num_frames], [0, *changes.tolist(), len(words)]
        empty = next((span for span in range(len(kinds)) if edges[span] == edges[span + 1]), None)
        if empty is None or len(kinds) == 1:
            return list(zip(kinds, edges[:-1], edges[1:], bounds[:-1], bounds[1:], strict=True))
        written[bounds[empty] : bounds[empty + 1]] ^= True


def deinterleave(
    symbols: np.ndarray, durations: np.ndarray, pieces: TextPieces, vocabulary: Vocabulary
) -> list[Span]:
    """The spans that `interleave` made a sequence of, in order. ValueError naming the place where it is no
    such sequence."""
    markers = np.flatnonzero(symbols >= vocabulary.speech_marker)
    if not len(markers) or markers[0] > 0:
        raise ValueError(
            "a sequence of speech and text begins with the marker of one of them, <Speech> or <Text>"
        )
    spans, frame = [], 0
    for marker, end in zip(markers.tolist(), [*markers[1:].tolist(), len(symbols)], strict=True):
        is_text = symbols[marker] == vocabulary.text_marker
        inside, lengths = symbols[marker + 1 : end], durations[marker + 1 : end]
        strays = np.flatnonzero((inside >= vocabulary.num_units) != is_text)
        if len(strays):
            place = marker + 1 + int(strays[0])
            raise ValueError(
                f"symbol {place}, {symbols[place]}, is {'speech' if is_text else 'text'} in a span of the "
                "other"
            )
        after = frame + int(durations[marker:end].sum(dtype=np.int64))
        if is_text:
            spelled = inside - vocabulary.num_units
            if not len(spelled) or not pieces.pieces[spelled[0]].startswith(WORD):
                raise ValueError(f"the span of text at symbol {marker} does not begin with a word")
            words = tuple(pieces.decode(spelled).split(" "))
            spans.append(Span("text", frame, after, inside[:0], lengths[:0], words))
        else:
            spans.append(Span("speech", frame, after, inside, lengths, ()))
        frame = after
    return spans


def interleaved_document(
    utterance: Utterance,
    frames: np.ndarray,
    pieces: TextPieces,
    vocabulary: Vocabulary,
    config: TextConfig,
    *,
    deduplicated: bool = True,
) -> Document:
    """An utterance's labels per frame (frames,) and words as a document. What is written follows from
    (config.seed, id) alone.

    Errors: ValueError naming the utterance, without word times or with a character that the pieces lack.
    """
    words = spoken_words(utterance, config)
    number = int.from_bytes(hashlib.sha256(utterance.id.encode()).digest()[:8])
    written = draw_written(
        len(words), config.fraction, config.span_words, np.random.default_rng([config.seed, number])
    )
    try:
        symbols, durations = interleave(frames, words, written, pieces, vocabulary, deduplicated=deduplicated)
    except ValueError as error:
        raise ValueError(f"utterance {utterance.id!r}: {error}") from None
    return Document(utterance.id, utterance.split, symbols, durations)
