"""What the symbols of a unit corpus stand for: units, merged units, text.

A corpus has one or several streams of symbols, all of one length. Of speech alone: one stream for a plain
codebook, one per level for a codebook with several (residual k-means, codecs). Merges (unit BPE) and text add
symbols behind the K units. BOS, EOS and padding are none of these: they belong to the sequences that models
read (`units/corpus/patterns.py`).
"""

from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config

Layout = Literal["units", "interleaved", "grid"]


class Vocabulary(Config):
    """The symbols of each stream, numbered from 0.

    `units`        one stream of K units and the merges, or a stream of K units for each level
    `interleaved`  one stream: K units, the text pieces, SPEECH and TEXT, which open a span of either
                   (Spirit LM; Nguyen et al., 2024)
    `grid`         text on the frame grid in stream 0, its pieces and PAD, then the levels of units
                   (Moshi; Défossez et al., 2024)

    >>> vocabulary = Vocabulary(num_units=2, merges=((0, 1), (2, 0)))
    >>> vocabulary.names(), vocabulary.expand(np.array([3, 1]))
    (['<Un0>', '<Un1>', '<Un0><Un1>', '<Un0><Un1><Un0>'], array([0, 1, 0, 1]))
    """

    num_units: int = Field(ge=1, description="K; every level has as many")
    num_levels: int = Field(1, ge=1)
    merges: tuple[tuple[int, int], ...] = Field(
        (), description="symbol K + i stands for the two earlier symbols merges[i]"
    )
    text: tuple[str, ...] = Field((), description="text pieces")
    layout: Layout = "units"

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if (self.layout == "units") == bool(self.text):
            raise ValueError(
                f"layout {self.layout!r} with {len(self.text)} text pieces; text needs a layout of its own, "
                "and that text"
            )
        if self.merges and (self.layout != "units" or self.num_levels > 1):
            raise ValueError("merges (unit BPE) are for one stream of units without text")
        if self.layout == "interleaved" and self.num_levels > 1:
            raise ValueError(
                "interleaved text is for units of one level; several go with text on the frame grid"
            )
        for number, pair in enumerate(self.merges):
            if not all(0 <= symbol < self.num_units + number for symbol in pair):
                raise ValueError(
                    f"merge {number} is of {pair}; it can only be of symbols below {self.num_units + number}"
                )
        return self

    @classmethod
    def read(cls, described: Any) -> Self:
        """From `model_dump(mode="json")`, where lists stand for tuples."""
        return cls.model_validate(described, strict=False)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Symbols of each stream."""
        if self.layout == "interleaved":
            return (self.num_units + len(self.text) + 2,)
        levels = (self.num_units + len(self.merges), *[self.num_units] * (self.num_levels - 1))
        return levels if self.layout == "units" else (len(self.text) + 1, *levels)

    @property
    def speech_marker(self) -> int:
        """Opens a span of speech in an interleaved stream."""
        assert self.layout == "interleaved"
        return self.num_units + len(self.text)

    @property
    def text_marker(self) -> int:
        """Opens a span of text in an interleaved stream."""
        return self.speech_marker + 1

    @property
    def grid_pad(self) -> int:
        """Says in the text stream of a grid that no piece begins at this frame."""
        assert self.layout == "grid"
        return len(self.text)

    def names(self, stream: int = 0) -> list[str]:
        """The symbols of a stream in writing: `<Un3>`; at level l of several `<Un3:l>`; `<Tx:a>` for a piece
        of text."""
        level = stream - (self.layout == "grid")
        suffix = f":{level}" if self.num_levels > 1 else ""
        text = [f"<Tx:{piece}>" for piece in self.text]
        if level < 0:
            return [*text, "<Pad>"]
        units = [f"<Un{unit}{suffix}>" for unit in range(self.num_units)]
        for first, second in self.merges:
            units.append(units[first] + units[second])
        return [*units, *text, "<Speech>", "<Text>"] if self.layout == "interleaved" else units

    def is_text(self, stream: int = 0) -> np.ndarray:
        """Which symbols of a stream are text, (size,) bool; what opens a span of text, and the grid's PAD,
        are."""
        symbols = np.arange(self.sizes[stream])
        if self.layout == "interleaved":
            return (symbols >= self.num_units) & (symbols != self.speech_marker)
        return np.full(len(symbols), self.layout == "grid" and stream == 0)

    @cached_property
    def unit_counts(self) -> np.ndarray:
        """How many units each symbol of stream 0 stands for, (size,) int64; of text: none."""
        counts = np.where(self.is_text(), 0, 1)
        if self.layout == "interleaved":
            counts[self.speech_marker] = 0
        for number, (first, second) in enumerate(self.merges, start=self.num_units):
            counts[number] = counts[first] + counts[second]
        return counts

    def expand(self, tokens: np.ndarray) -> np.ndarray:
        """Merges undone: the units (units,) that tokens (tokens,) of stream 0 stand for, in the dtype of
        `tokens`."""
        if not self.merges:
            return tokens
        counts = self.unit_counts[tokens]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._spelled[np.repeat(self._starts[tokens], counts) + within].astype(tokens.dtype)

    @cached_property
    def _spelled(self) -> np.ndarray:
        """The units of all symbols, end to end."""
        spellings = [np.array([unit]) for unit in range(self.num_units)]
        for first, second in self.merges:
            spellings.append(np.concatenate([spellings[first], spellings[second]]))
        return np.concatenate(spellings)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.unit_counts) - self.unit_counts

    def differences(self, other: "Vocabulary") -> str:
        """In what two vocabularies differ, in short, this one's first; empty where they are the same."""
        named = []
        for key in Vocabulary.model_fields:
            ours, theirs = getattr(self, key), getattr(other, key)
            if ours != theirs:
                long = isinstance(ours, tuple)
                named.append(
                    f"{key} {len(ours)} against {len(theirs)}"
                    if long
                    else f"{key} {ours!r} against {theirs!r}"
                )
        return ", ".join(named)
