"""Decoding of many utterances: here, or in processes beside the encoder.

flashlight keeps Python's lock while it searches, so threads would gain nothing (measured: two threads take
twice as long as one).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pretrain.ctc.decoding import Decoder, DecodingConfig, Hypothesis
from pretrain.ctc.model import LoadedRecognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.store.interrupts import process_pool

T = TypeVar("T")
Weights = tuple[float, float] | None  # lm_weight and word_score in place of the config's
Decoded = tuple[list[Hypothesis], float]  # and the seconds it took


class Search:
    """A decoder here, or the same in each process of a pool; `seconds` are those of all results so far."""

    def __init__(self, decoder: Decoder, pool: ProcessPoolExecutor | None, processes: int):
        self.decoder, self.pool, self.processes, self.seconds = decoder, pool, processes, 0.0

    def submit(self, log_probs: Tensor, weights: Weights) -> Future[Decoded]:
        if self.pool is not None:
            return self.pool.submit(_decode_there, log_probs.numpy(), weights)
        done: Future[Decoded] = Future()
        done.set_result(_decode(self.decoder, log_probs, weights))
        return done

    def result(self, future: Future[Decoded]) -> list[Hypothesis]:
        hypotheses, seconds = future.result()
        self.seconds += seconds
        return hypotheses


@contextmanager
def open_search(config: DecodingConfig, decoder: Decoder, recognizer: LoadedRecognizer) -> Iterator[Search]:
    """The search that a config asks for; its processes end with the context."""
    if config.processes == 1 or config.method == "greedy":
        yield Search(decoder, None, 1)
        return
    start = (config, recognizer.vocabulary.to_meta(), recognizer.text)
    with process_pool(config.processes, _start_there, start) as pool:
        yield Search(decoder, pool, config.processes)


_there: Decoder | None = None  # of a process that searches


def _start_there(config: DecodingConfig, vocabulary: dict[str, Any], text: TextConfig) -> None:
    global _there
    torch.set_num_threads(1)
    _there = Decoder(config, Vocabulary.from_meta(vocabulary), text)


def _decode_there(log_probs: np.ndarray, weights: Weights) -> Decoded:
    assert _there is not None
    return _decode(_there, torch.from_numpy(log_probs), weights)


def _decode(decoder: Decoder, log_probs: Tensor, weights: Weights) -> Decoded:
    began = time.monotonic()
    hypotheses = (decoder if weights is None else decoder.with_weights(*weights)).decode(log_probs)
    return hypotheses, time.monotonic() - began


def decoded(
    outputs: Iterator[tuple[int, Tensor]],
    search: Search,
    weights: Weights,
    finish: Callable[[int, Tensor, list[Hypothesis]], T],
) -> Iterator[tuple[int, T]]:
    """`finish` of each utterance's row number, log probabilities and hypotheses, in order; few wait, so that
    memory stays bounded."""
    waiting: deque[tuple[int, Tensor, Future[Decoded]]] = deque()

    def first() -> tuple[int, T]:
        item, log_probs, future = waiting.popleft()
        return item, finish(item, log_probs, search.result(future))

    for item, log_probs in outputs:
        waiting.append((item, log_probs, search.submit(log_probs, weights)))
        while len(waiting) > 8 * search.processes:
            yield first()
    while waiting:
        yield first()
