"""Speeds of a transcription, and times of words."""

import time
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from pretrain.ctc.alignment import forced_alignment, stretch, word_times
from pretrain.ctc.decoding import Hypothesis
from pretrain.ctc.model import LoadedRecognizer
from pretrain.ctc.rates_text import as_text as as_text
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.utterance import Utterance, Word


class Clock:
    """Seconds of the encoder (with the reading of audio), of the search, summed over its processes, and
    altogether."""

    def __init__(self) -> None:
        self.began, self.encoded, self.searched = time.monotonic(), 0.0, 0.0

    def speeds(self, seconds: float) -> dict[str, float]:
        """Of `seconds` of audio: in all, of the encoder and of the search."""
        return {
            "audio_seconds": seconds,
            "audio_seconds_per_second": seconds / self.elapsed,
            "encoder_audio_seconds_per_second": seconds / max(self.encoded, 1e-9),
            "search_audio_seconds_per_second": seconds / max(self.searched, 1e-9),
        }

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def timed(self, outputs: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        while True:
            began = time.monotonic()
            following = next(outputs, None)
            self.encoded += time.monotonic() - began
            if following is None:
                return
            yield following


def times_said(hypothesis: Hypothesis, log_probs: Tensor, vocabulary: Vocabulary) -> list[Word] | None:
    """When each word of a hypothesis was said; None where the frames do not hold the spelling that is taken
    to be the word's."""
    classes = np.array(hypothesis.classes, np.int64)
    words = vocabulary.words(classes) if hypothesis.words is None else hypothesis.words
    if not words:
        return []
    try:
        spans = forced_alignment(log_probs, classes)
    except ValueError:
        return None
    times = stretch([(spans[first].start, spans[last - 1].end) for _, first, last in words], len(log_probs))
    return [Word(*time, word) for time, (word, _, _) in zip(times, words, strict=True)]


def times_of_text(row: Utterance, log_probs: Tensor, recognizer: LoadedRecognizer) -> list[Word] | str:
    """When each word, or phone, of the transcript was said, or why that cannot be told."""
    target = recognizer.text.target(row)
    if not target:
        return f"has no {recognizer.text.column}"
    if unknown := recognizer.vocabulary.unknown(target):
        return f"has {sorted(unknown)}, not in the vocabulary"
    classes = recognizer.vocabulary.encode(target)
    try:
        return word_times(
            forced_alignment(log_probs, classes), classes, recognizer.vocabulary, len(log_probs)
        )
    except ValueError as error:
        return str(error)
