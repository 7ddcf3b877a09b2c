"""Documents of a corpus as a language model reads them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from units.corpus.patterns import Pattern
from units.corpus.unit_corpus import UnitCorpus


class DocumentSequences(Protocol):
    """Documents as a model reads them, BOS and EOS included: (steps,) int64 or (steps, streams)."""

    @property
    def lengths(self) -> np.ndarray:
        """Predicted steps of each, one fewer than its steps, int64 (documents,)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: Any) -> np.ndarray: ...
    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Steps start .. stop of document i."""


class Sequences(Sequence[np.ndarray]):
    """Some documents of a corpus, arranged by a pattern when they are asked for."""

    def __init__(self, corpus: UnitCorpus, documents: np.ndarray, pattern: Pattern):
        assert pattern.sizes == corpus.vocabulary.sizes
        self.corpus, self.documents, self.pattern = corpus, documents, pattern
        self.lengths: np.ndarray = pattern.length(corpus.lengths[documents]) - 1

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: Any) -> Any:
        return self.pattern.arrange(self.corpus.tokens(self.documents[i]))

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        if self.corpus.num_streams > 1:
            return self[i][start:stop]
        # A plain sequence is BOS, tokens, EOS: long documents are not read whole for each of their pieces.
        document, (size,) = self.documents[i], self.corpus.vocabulary.sizes
        stop = min(stop, int(self.lengths[i]) + 1)
        bos, eos = [size] if start == 0 else [], [size + 1] if stop == self.lengths[i] + 1 else []
        tokens = self.corpus.tokens(document)[max(start - 1, 0) : stop - 1]
        return np.concatenate([bos, tokens, eos]).astype(np.int64)


class ListedSequences(list[np.ndarray]):
    """Sequences in memory, BOS and EOS included."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) - 1 for sequence in self], np.int64)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        return self[i][start:stop]
