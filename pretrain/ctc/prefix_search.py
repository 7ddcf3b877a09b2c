"""Prefix beam search with a lexicon where nothing stands between words: phones, pieces of a tokenizer,
scripts without spaces.

flashlight's search with a lexicon lets the last symbol of a word last a single frame unless a separator
follows, so it serves vocabularies with a space only. This one is plain Python and sums over alignments, too
(Hannun et al., arXiv 1408.2873): its states are what words were said, a place in the lexicon's tree and the
last symbol, each with the probability of ending in a blank and not. It is slow: with 20,000 words and a beam
of 50, ten seconds of audio took 0.5 to 0.8 s trying 10 symbols a frame, and 3 s trying all 40.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pretrain.ctc.lexicon import LanguageModel
from pretrain.ctc.vocabulary import BLANK

NEVER = -math.inf


class Node:
    """A place in the tree of spellings: symbols that may follow, words that end here, the best unigram score
    at or below it."""

    __slots__ = ("best", "children", "words")

    def __init__(self) -> None:
        self.children: dict[int, Node] = {}
        self.words: list[int] = []
        self.best = NEVER

    def insert(self, classes: list[int], word: int, unigram: float) -> None:
        """Add a spelling (n,) of `word`."""
        node = self
        node.best = max(node.best, unigram)
        for symbol in classes:
            node = node.children.setdefault(symbol, Node())
            node.best = max(node.best, unigram)
        if word not in node.words:
            node.words.append(word)


class History:
    """Words said so far, one object for each sequence, with their log10 probability."""

    __slots__ = ("children", "lm_score", "num_words", "parent", "state", "word")

    def __init__(self, parent: "History | None", word: int, state: Any, lm_score: float):
        self.parent, self.word, self.state, self.lm_score = parent, word, state, lm_score
        self.num_words: int = 0 if parent is None else parent.num_words + 1
        self.children: dict[int, History] = {}

    def then(self, word: int, lm: LanguageModel | None) -> "History":
        if word not in self.children:
            state, score = (None, 0.0) if lm is None else lm.kenlm.score(self.state, word)
            self.children[word] = History(self, word, state, self.lm_score + score)
        return self.children[word]

    def words(self) -> tuple[int, ...]:
        said, history = [], self
        while history.parent is not None:
            said.append(history.word)
            history = history.parent
        return tuple(reversed(said))


Beam = dict[tuple[History, Node, int], list[float]]  # log probability of ending in a blank, and in a symbol


def prefix_search(
    log_probs: np.ndarray,
    root: Node,
    lm: LanguageModel | None,
    *,
    lm_weight: float,
    word_score: float,
    beam_size: int,
    beam_tokens: int | None,
    beam_threshold: float,
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Word numbers and natural log of the probability of (frames, classes), summed over alignments, in no
    order.

    Hypotheses that end inside a word are dropped; if all do, the words before it are given.
    """

    def bonus(history: History, node: Node) -> float:
        # The best score of the word that has begun, as flashlight's MAX smearing.
        ahead = 0.0 if lm is None or node is root else node.best
        return lm_weight * (history.lm_score + ahead) + word_score * history.num_words

    start = History(None, -1, None if lm is None else lm.start(), 0.0)
    beam: Beam = {(start, root, BLANK): [0.0, NEVER]}
    for frame in log_probs:
        allowed = range(len(frame))
        if beam_tokens is not None:
            allowed = np.argsort(-frame, kind="stable")[:beam_tokens].tolist()
        following = _extend(beam, frame.tolist(), set(allowed), root, lm, bonus, beam_threshold)
        ranked = [
            (_log_add(*scores) + bonus(*key[:2]), number)
            for number, (key, scores) in enumerate(following.items())
        ]
        least = max(ranked)[0] - beam_threshold
        best = heapq.nlargest(beam_size, (entry for entry in ranked if entry[0] >= least))
        kept = {number for _, number in best}
        beam = {key: scores for number, (key, scores) in enumerate(following.items()) if number in kept}
    complete = [key for key in beam if key[1] is root]
    found: dict[History, float] = {}
    for key in complete or beam:
        found[key[0]] = _log_add(found.get(key[0], NEVER), _log_add(*beam[key]))
    for history, score in found.items():
        yield history.words(), score


def _extend(
    beam: Beam,
    emission: list[float],
    chosen: set[int],
    root: Node,
    lm: LanguageModel | None,
    bonus: Callable[[History, Node], float],
    beam_threshold: float,
) -> Beam:
    """The hypotheses of a beam after one more frame, whose log probabilities are `emission`; `chosen` symbols
    may begin."""
    following: Beam = {}

    def add(key: tuple[History, Node, int], place: int, score: float) -> None:
        scores = following.setdefault(key, [NEVER, NEVER])
        scores[place] = _log_add(scores[place], score)

    # A new symbol far below the best hypothesis that goes on without one is dropped: most symbols in most
    # frames.
    goes_on = max(_log_add(*scores) + bonus(*key[:2]) for key, scores in beam.items())
    least = goes_on + emission[BLANK] - beam_threshold
    for (history, node, last), (blank, symbol) in beam.items():
        total = _log_add(blank, symbol)
        add((history, node, last), 0, total + emission[BLANK])
        if last != BLANK:
            add((history, node, last), 1, symbol + emission[last])
        for after, child in node.children.items():
            before = blank if after == last else total
            score = before + emission[after]
            if after not in chosen or before == NEVER:
                continue
            if child.children and score + bonus(history, child) >= least:
                add((history, child, after), 1, score)
            for word in child.words:
                longer = history.then(word, lm)
                if score + bonus(longer, root) >= least:
                    add((longer, root, after), 1, score)
    return following


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
