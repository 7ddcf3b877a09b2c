"""Recognition while one speaks: greedy decoding of a streaming recogniser, chunk by chunk, with its latency.

    recognizer = OnlineRecognizer(load_recognizer("runs/streaming").model)
    for samples in microphone:  # float32, 16 kHz, pieces of any size
        print(recognizer.accept(samples).text, end=" ", flush=True)
    print(recognizer.finish().text)

The words are those that `transcribe` writes for the whole utterance at once. Nothing here looks for the end
of an utterance: what is kept between chunks is bounded when the recogniser has `left_chunks`, so that a
stream may go on, but its statistics over time are those of everything since it began.
"""

import time
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.ctc.model import Recognizer
from pretrain.ctc.vocabulary import BLANK
from pretrain.data.utterance import HOP, SAMPLE_RATE
from pretrain.model.online import OnlineEncoder

PIECE_SAMPLES = 1600  # what a sound card gives at a time, about


class Recognized(NamedTuple):
    """What became final with a piece of audio."""

    text: str  # whole words; what of a word is there so far is `partial`
    partial: str
    classes: list[int]  # without blanks and repeats
    log_probs: Tensor  # (frames, classes) float32, on the CPU
    chunk_seconds: list[float]  # that the computation of each chunk took


class OnlineRecognizer:
    """Greedy decoding of one utterance after the other, in pieces. The encoder must be a streaming one, the
    model in eval mode."""

    def __init__(self, model: Recognizer):
        self.model, self.vocabulary = model, model.vocabulary
        self._encoder = OnlineEncoder(model.encoder, model.layers)
        self._begin()

    def _begin(self) -> None:
        self._encoder.reset()
        self._previous = BLANK  # class of the last frame
        self._pending: list[int] = []  # classes since the last whole word

    def accept(self, samples: np.ndarray) -> Recognized:
        """Takes the next samples (samples,) float32 at 16 kHz, or for a recogniser of units (frames,) or
        (frames, levels) integers as `LabelBatches` gives them."""
        return self._take(self._checked(samples), last=False)

    def finish(self) -> Recognized:
        """The rest of the utterance; what is accepted from now on is the next one."""
        rest = self._take(torch.zeros(0), last=True)
        self._begin()
        return rest

    def _checked(self, samples: np.ndarray) -> Tensor:
        config = self.model.encoder.config
        if config.front_end == "units":
            if samples.ndim not in (1, 2) or samples.dtype.kind not in "iu":
                raise ValueError(
                    f"units are integers (frames,) or (frames, levels); got {samples.dtype} {samples.shape}"
                )
            assert config.num_units is not None
            if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < config.num_units:
                raise ValueError(
                    f"this recogniser reads units 0 to {config.num_units - 1}; got {samples.min()} to "
                    f"{samples.max()}"
                )
            return torch.from_numpy(samples.astype(np.int64))
        if samples.ndim != 1 or samples.dtype != np.float32:
            raise ValueError(
                f"samples are float32 (samples,) in [-1, 1] at 16 kHz, of one channel; got {samples.dtype} "
                f"{samples.shape} (int16 samples are divided by 32768)"
            )
        if not np.isfinite(samples).all():  # one would stay in the statistics for good
            raise ValueError(
                f"sample {int(np.flatnonzero(~np.isfinite(samples))[0])} of this piece is not a finite number"
            )
        return torch.from_numpy(samples.copy())  # np.frombuffer's cannot be written to, and torch warns

    @torch.no_grad()
    def _take(self, samples: Tensor, last: bool) -> Recognized:
        found, log_probs, seconds = [], [torch.zeros(0, len(self.vocabulary))], []
        began = time.perf_counter()
        for chunk in self._encoder.feed(samples, last):
            log_probs.append(self.model.classify(chunk.last, chunk.layers).float().log_softmax(1).cpu())
            for number in log_probs[-1].argmax(1).tolist():
                if number not in (self._previous, BLANK):
                    found.append(number)
                self._previous = number
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
        self._pending += found
        cut = len(self._pending) if last else self._end_of_words()
        words, self._pending = self._pending[:cut], self._pending[cut:]
        text, partial = self.vocabulary.decode(words), self.vocabulary.decode(self._pending)
        return Recognized(text, partial, found, torch.cat(log_probs), seconds)

    def _end_of_words(self) -> int:
        """How many of the pending classes make words that nothing can be added to."""
        if self.vocabulary.spelling == "phones":
            return len(self._pending)
        if self.vocabulary.space is not None:
            return len(self._pending) - (
                [*reversed(self._pending), self.vocabulary.space].index(self.vocabulary.space)
            )
        words = self.vocabulary.words(self._pending)  # of which a piece may have two
        return max((first for (_, _, end), (_, first, _) in pairwise(words) if end <= first), default=0)


class Latency:
    """How late a streaming recogniser's words are: by what it waits for, and by what it computes."""

    def __init__(self, model: Recognizer):
        config = model.encoder.config
        assert config.streaming is not None
        self.algorithmic = config.streaming.latency_ms(model.encoder.front_end.tail)
        self.chunk_seconds: list[float] = []
        self.audio_seconds = 0.0

    def add(self, chunk_seconds: list[float], audio_seconds: float) -> None:
        self.chunk_seconds += chunk_seconds
        self.audio_seconds += audio_seconds

    def summary(self) -> dict[str, Any]:
        """For summary.json. `algorithmic_ms`: from a frame's first sample to the last that its output needs,
        the worst and the mean over frames; `chunk_ms`: computing a chunk, one at a time on this machine;
        `real_time_factor`: all of that over the audio."""
        taken = np.array(self.chunk_seconds or [0.0]) * 1000
        p50, p95, worst = np.percentile(taken, [50, 95, 100]).tolist()
        return {
            "algorithmic_ms": self.algorithmic,
            "chunk_ms": {"p50": p50, "p95": p95, "worst": worst},
            "real_time_factor": float(taken.sum()) / 1000 / max(self.audio_seconds, 1e-9),
        }


def recognize_online(
    recognizer: OnlineRecognizer, inputs: np.ndarray, latency: Latency
) -> tuple[str, Tensor]:
    """One utterance, samples (samples,) or units (frames,), in pieces as if it were spoken: its text and its
    log probabilities (frames, classes) float32."""
    units = recognizer.model.encoder.config.front_end == "units"
    size, rate = (1, SAMPLE_RATE // HOP) if units else (PIECE_SAMPLES, SAMPLE_RATE)
    parts = [recognizer.accept(inputs[start : start + size]) for start in range(0, len(inputs), size)]
    parts.append(recognizer.finish())
    latency.add([seconds for part in parts for seconds in part.chunk_seconds], len(inputs) / rate)
    return " ".join(part.text for part in parts if part.text), torch.cat([part.log_probs for part in parts])
