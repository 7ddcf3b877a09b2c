"""Prefix beam search with a lexicon where nothing stands between words: phones, pieces of a tokenizer, scripts without spaces.

flashlight's search with a lexicon lets the last symbol of a word last a single frame unless a separator follows, so it serves
vocabularies with a space only. This one is plain Python and sums over alignments, too (Hannun et al., arXiv 1408.2873): its states
are what words were said, a place in the lexicon's tree and the last symbol, each with the probability of ending in a blank and not.
It is slow: with 20,000 words and a beam of 50, ten seconds of audio took 0.5 to 0.8 s trying 10 symbols a frame, and 3 s trying all 40.
"""

import heapq
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pretrain.ctc.lexicon import LanguageModel
from pretrain.ctc.vocabulary import BLANK

NEVER = -math.inf


class Node:
    """A place in the tree of spellings: symbols that may follow, words that end here, the best unigram score at or below it."""

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
    """Word numbers and natural log of the probability of (frames, classes), summed over alignments, in no order.

    What ends inside a word is dropped; if everything does, the words before it are given.
    """

    def bonus(history: History, node: Node) -> float:
        ahead = (
            0.0 if lm is None or node is root else node.best
        )  # the best that the word begun can be, as flashlight's MAX smearing
        return lm_weight * (history.lm_score + ahead) + word_score * history.num_words

    start = History(None, -1, None if lm is None else lm.start(), 0.0)
    beam: dict[tuple[History, Node, int], list[float]] = {
        (start, root, BLANK): [0.0, NEVER]
    }  # ending in a blank, and not
    for frame in log_probs:
        allowed = (
            range(len(frame))
            if beam_tokens is None
            else np.argsort(-frame, kind="stable")[:beam_tokens].tolist()
        )
        emission, chosen = frame.tolist(), set(allowed)
        following: dict[tuple[History, Node, int], list[float]] = {}

        def add(
            key: tuple[History, Node, int], place: int, score: float, into: dict[Any, list[float]] = following
        ) -> None:
            scores = into.setdefault(key, [NEVER, NEVER])
            scores[place] = _log_add(scores[place], score)

        # What is far below the best of the hypotheses that only go on is not worth a place: most symbols in most frames.
        least = (
            max(_log_add(*scores) + bonus(*key[:2]) for key, scores in beam.items())
            + emission[BLANK]
            - beam_threshold
        )
        for key, (blank, symbol) in beam.items():
            history, node, last = key
            total = _log_add(blank, symbol)
            add(key, 0, total + emission[BLANK])
            if last != BLANK:
                add(key, 1, symbol + emission[last])
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
        ranked = [
            (_log_add(*scores) + bonus(*key[:2]), number)
            for number, (key, scores) in enumerate(following.items())
        ]
        least = max(ranked)[0] - beam_threshold
        kept = {
            number
            for _, number in heapq.nlargest(beam_size, (entry for entry in ranked if entry[0] >= least))
        }
        beam = {key: scores for number, (key, scores) in enumerate(following.items()) if number in kept}
    complete = [key for key in beam if key[1] is root]
    found: dict[History, float] = {}
    for key in complete or beam:
        found[key[0]] = _log_add(found.get(key[0], NEVER), _log_add(*beam[key]))
    for history, score in found.items():
        yield history.words(), score


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
