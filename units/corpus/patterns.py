"""Patterns: the codes of several levels in the one sequence of steps that a language model reads.

A document's codes are (n,), or (n, levels) for residual units, codec codes and text on the frame grid.
`Pattern.arrange` turns them into a sequence, and `Pattern.restore` turns it back, exactly. With n = 3 codes
of levels a and b (Copet et al., 2023, section 2.2):

    parallel      a  BOS a1  a2  a3  EOS          all levels of a frame at once, independently
                  b  BOS b1  b2  b3  PAD
    delay         a  BOS a1  a2  a3  EOS          level l is l steps later, after lower levels
                  b  BOS PAD b1  b2  b3
    flatten          BOS a1 b1 a2 b2 a3 b3 EOS    exact, and `levels` times as long
    coarse-first     BOS a1 a2 a3 EOS b1 b2 b3    exact; all of level 0 first, then each level above it

parallel and delay have a stream per level, (steps, levels); the others have one stream, (steps,), in which
symbol s of level l is offset[l] + s. With a single level all four are BOS a1 … an EOS. BOS is in row 0 of
every stream, EOS in stream 0 only.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

PATTERNS = ("parallel", "delay", "flatten", "coarse-first")

Count = TypeVar("Count", int, np.ndarray)


class Pattern:
    """A pattern over streams of codes with `sizes` symbols each.

    `vocabularies` are the symbols of each stream of the *sequence*: (sum(sizes) + 2,) with BOS and EOS last,
    or (size + 3,) each with BOS, EOS and PAD last. `offsets` (levels,) are added to the codes of each level,
    0 if it has its own stream.
    """

    def __init__(self, name: str, sizes: Sequence[int]):
        if name not in PATTERNS:
            raise ValueError(f"pattern {name!r} is not known; there are {', '.join(PATTERNS)}")
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"pattern {name}: sizes {tuple(sizes)}: one or more levels of one or more symbols each are "
                "needed"
            )
        self.name = name
        self.sizes = tuple(int(size) for size in sizes)
        self.num_levels = len(self.sizes)
        levels = self.num_levels
        self._kind = "plain" if levels == 1 else name
        if self._kind in ("parallel", "delay"):
            self.offsets = np.zeros(levels, np.int64)
            self.bos = np.array(self.sizes, np.int64)  # (Q,)
            self.vocabularies: tuple[int, ...] = tuple(size + 3 for size in self.sizes)
        else:
            self.offsets = np.cumsum([0, *self.sizes[:-1]])
            self.bos = np.array([sum(self.sizes)], np.int64)
            self.vocabularies = (sum(self.sizes) + 2,)
        self.eos = int(self.bos[0]) + 1  # of stream 0, the only one that has it
        self.pad = self.bos + 2  # (Q,); a single stream has none: no cell ever holds it

    def __repr__(self) -> str:
        return f"Pattern({self.name!r}, {self.sizes})"

    @property
    def num_streams(self) -> int:
        """Q: the streams of the sequence."""
        return len(self.vocabularies)

    def length(self, n: Count) -> Count:
        """Steps of the whole sequence of n codes, the BOS and EOS rows included."""
        match self._kind:
            case "plain" | "parallel":
                return n + 2
            case "delay":
                return n + max(2, self.num_levels)
            case _:
                return n * self.num_levels + 2

    def prefix_length(self, n: Count) -> Count:
        """Steps of the beginning that n codes leave no doubt about: BOS and what precedes the next code of
        level 0.
        """
        return 1 + n * self.num_levels if self._kind == "flatten" else 1 + n

    def arrange(self, codes: np.ndarray) -> np.ndarray:
        """The sequence of a document's codes: int64 (steps,) with one stream, else (steps, Q).

        Raises ValueError for codes of another shape than (n,) or (n, levels), or outside their level's
        symbols.
        """
        table = self._checked(codes)
        n = len(table)
        sequence = np.tile(self.pad, (self.length(n), 1))
        sequence[0] = self.bos
        sequence[self.prefix_length(n), 0] = self.eos
        sequence[self.cells(n)] = table + self.offsets
        return sequence[:, 0] if self.num_streams == 1 else sequence

    def restore(self, sequence: np.ndarray) -> np.ndarray:
        """The codes that `arrange` made `sequence` from: int64 (n,) or (n, levels).

        ValueError for any other sequence.
        """
        sequence = np.asarray(sequence)
        n = self._codes_in(sequence)
        table = sequence.reshape(len(sequence), self.num_streams)[self.cells(n)] - self.offsets
        codes = table[:, 0] if self.num_levels == 1 else table
        if (table < 0).any() or (table >= self.sizes).any():
            raise ValueError(
                f"{self}: no arrangement: a code's cell holds another level's symbol or a special one"
            )
        wrong = np.argwhere(self.arrange(codes) != sequence)
        if len(wrong):
            raise ValueError(
                f"{self}: no arrangement: step {wrong[0][0]} holds {sequence[wrong[0][0]]}, which cannot "
                "stand there"
            )
        return codes.astype(np.int64)

    def predicted(self, sequence: np.ndarray) -> np.ndarray:
        """Which cells of a sequence, or of a piece of one, a model is asked for: the codes and EOS. bool, of
        its shape.
        """
        bos, pad = (self.bos[0], self.pad[0]) if self.num_streams == 1 else (self.bos, self.pad)
        asked: np.ndarray = (sequence != bos) & (sequence != pad)
        return asked

    def levels(self, sequence: np.ndarray) -> np.ndarray:
        """The level of the code in each cell of a sequence or of a piece of one, -1 for BOS, EOS and PAD.
        int64, of its shape.
        """
        if self.num_streams == 1:
            level = np.searchsorted(self.offsets, sequence, side="right") - 1
            return np.where(sequence < self.bos[0], level, -1)
        return np.where(sequence < self.bos, np.arange(self.num_levels), -1)

    def cells(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(step, stream) of each code, (n, levels) both or broadcast to it."""
        t, level = np.arange(n)[:, None], np.arange(self.num_levels)[None, :]
        match self._kind:
            case "plain" | "parallel":
                return 1 + t, level
            case "delay":
                return 1 + t + level, level
            case "flatten":
                return 1 + t * self.num_levels + level, np.zeros_like(level)
            case _:
                return 1 + (level > 0) + level * n + t, np.zeros_like(level)

    def _codes_in(self, sequence: np.ndarray) -> int:
        """n, by the sequence's shape."""
        shape = (len(sequence), self.num_streams) if self.num_streams > 1 else (len(sequence),)
        if sequence.shape != shape:
            wanted = f"(steps, {self.num_streams})" if self.num_streams > 1 else "(steps,)"
            raise ValueError(f"{self}: a sequence has the shape {wanted}, not {sequence.shape}")
        per_code = self.length(1) - self.length(0)
        n, left = divmod(len(sequence) - self.length(0), per_code)
        if n < 0 or left:
            raise ValueError(
                f"{self}: no arrangement: no number of codes makes {len(sequence)} steps; was it cut?"
            )
        return int(n)

    def _checked(self, codes: np.ndarray) -> np.ndarray:
        """Codes as int64 (n, levels)."""
        codes = np.asarray(codes)
        shape = (len(codes),) if self.num_levels == 1 else (len(codes), self.num_levels)
        if codes.shape != shape:
            wanted = "(n,)" if self.num_levels == 1 else f"(n, {self.num_levels})"
            raise ValueError(f"{self}: a document's codes have the shape {wanted}, not {codes.shape}")
        table = codes.reshape(len(codes), self.num_levels).astype(np.int64)
        wrong = np.argwhere((table < 0) | (table >= self.sizes))
        if len(wrong):
            t, level = wrong[0]
            where = f"position {t}" + (f", level {level}" if self.num_levels > 1 else "")
            raise ValueError(
                f"{self}: the code {table[t, level]} at {where} is outside 0 .. {self.sizes[level] - 1}"
            )
        return table


class Allowed(NamedTuple):
    """What may stand in the next row of each sequence of a batch."""

    low: np.ndarray  # int64 (batch, Q): the first symbol allowed in each stream
    high: np.ndarray  # int64 (batch, Q): one past the last; a single symbol where the cell is forced
    eos: np.ndarray  # bool (batch,): whether stream 0 may also end here


class Continuation:
    """A batch of sequences that grow a row at a time from prompts: the rules of sampling under a pattern.

    >>> growing = Continuation(pattern, prompts, max_codes=500)     # doctest: +SKIP
    ... growing.prefixes                # list of int64 (rows,) or (rows, Q): what the model reads first
    ... while not growing.done.all():
    ...     low, high, eos = growing.allowed()  # mask the logits with it, draw
    ...     rows = growing.append(drawn)        # what the model reads next
    ... growing.codes(i)                        # (n,) or (n, levels), prompt included

    A prompt's codes that belong in later rows (the upper levels under delay and coarse-first) are forced in
    those rows. At `max_codes` (of one sequence, with the prompt's) only EOS is allowed, so that every
    sequence ends as an arrangement. A document is never empty: EOS cannot be the first code.
    """

    def __init__(self, pattern: Pattern, prompts: Sequence[np.ndarray], max_codes: int | Sequence[int]):
        self.pattern, batch = pattern, len(prompts)
        tables = [pattern._checked(prompt) for prompt in prompts]
        self._given = np.array([len(table) for table in tables], np.int64)  # (batch,)
        self._limit = np.broadcast_to(np.asarray(max_codes, np.int64), (batch,))
        if (self._limit < np.maximum(self._given, 1)).any():
            i = int(np.argmax(self._limit < np.maximum(self._given, 1)))
            raise ValueError(
                f"prompt {i} has {self._given[i]} codes; max_codes {self._limit[i]} must be at least that, "
                "and 1"
            )
        self._prompts = np.zeros((batch, max(self._given, default=0) + 1, pattern.num_levels), np.int64)
        for i, table in enumerate(tables):
            self._prompts[i, : len(table)] = table
        starts: np.ndarray = pattern.prefix_length(self._given)
        self.prefixes = [
            pattern.arrange(prompt)[:start] for prompt, start in zip(prompts, starts.tolist(), strict=True)
        ]
        self._step = starts  # (batch,): the row that comes next
        self._n = np.full(batch, -1)  # (batch,): codes of the whole sequence, once EOS has come
        self._rows: list[np.ndarray] = []

    @property
    def done(self) -> np.ndarray:
        """bool (batch,): the sequences that have all their rows. Rows appended to these are not kept."""
        complete: np.ndarray = (self._n >= 0) & (self._step >= self.pattern.length(self._n))
        return complete

    @property
    def cut(self) -> np.ndarray:
        """bool (batch,): the sequences that ended because `max_codes` left them nothing but EOS."""
        return self._n == self._limit

    def allowed(self) -> Allowed:
        """What may stand in the next row. Of a sequence that is done: PAD, or any one symbol."""
        pattern, rows = self.pattern, np.arange(len(self._step))[:, None]
        t, level = self._frames()
        low = np.broadcast_to(pattern.offsets[level], t.shape)
        high = low + np.array(pattern.sizes)[level]
        ended = self._n[:, None] >= 0
        given = (t >= 0) & (t < self._given[:, None])
        prompt = self._prompts[rows, np.where(given, t, 0), level] + pattern.offsets[level]
        last = np.where(ended, self._n[:, None], self._limit[:, None])
        nothing = (t < 0) | (t >= last)  # no code: EOS where level 0 has run into the limit, else PAD
        full = ~ended & (level == 0) & (t == last)
        single = given | nothing
        symbol = np.where(
            full,
            pattern.eos,
            np.where(nothing, np.minimum(pattern.pad, np.array(pattern.vocabularies) - 1), prompt),
        )
        may_end = ~ended & (level == 0) & ~single & (t > 0)
        return Allowed(np.where(single, symbol, low), np.where(single, symbol + 1, high), may_end[:, 0])

    def append(self, rows: np.ndarray) -> np.ndarray:
        """Adds a row of allowed symbols to each sequence, (batch,) or (batch, Q); returns the rows, int64.

        Under parallel, where EOS is drawn beside the other levels' codes, these give way to PAD.
        """
        shape = np.shape(rows)
        table = np.array(rows, np.int64).reshape(len(self._step), self.pattern.num_streams)
        t, level = self._frames()
        done = self.done
        ends = ~done & (self._n < 0) & (level[:, 0] == 0) & (table[:, 0] == self.pattern.eos)
        self._n = np.where(ends, t[:, 0], self._n)
        table = np.where(ends[:, None] & (t >= self._n[:, None]) & (level > 0), self.pattern.pad, table)
        self._step = self._step + ~done
        self._rows.append(table)
        return table.reshape(shape)

    def sequence(self, i: int) -> np.ndarray:
        """Sequence i so far, prompt and BOS included: int64 (steps,) or (steps, Q)."""
        count = int(self._step[i]) - len(self.prefixes[i])
        grown = np.array([row[i] for row in self._rows[:count]], np.int64).reshape(
            count, self.pattern.num_streams
        )
        return np.concatenate([self.prefixes[i], grown[:, 0] if self.pattern.num_streams == 1 else grown])

    def codes(self, i: int) -> np.ndarray:
        """The codes of a sequence that is done, prompt included: int64 (n,) or (n, levels)."""
        return self.pattern.restore(self.sequence(i))

    def _frames(self) -> tuple[np.ndarray, np.ndarray]:
        """(t, level) of the code that each cell of the next row is for, int64 (batch, Q); t < 0 or ≥ n: for
        none.
        """
        pattern, row = self.pattern, self._step[:, None]
        streams = np.broadcast_to(np.arange(pattern.num_streams), (len(row), pattern.num_streams))
        match pattern._kind:
            case "plain" | "parallel":
                return np.broadcast_to(row - 1, streams.shape), streams
            case "delay":
                return row - 1 - streams, streams
            case "flatten":
                return (row - 1) // pattern.num_levels, (row - 1) % pattern.num_levels
            case _:
                n = self._n[:, None]
                upper = (n > 0) & (row > n + 1)  # level 0 has ended
                t = np.where(upper, (row - 2) % np.maximum(n, 1), row - 1)
                return t, np.where(
                    upper, np.minimum((row - 2) // np.maximum(n, 1), pattern.num_levels - 1), 0
                )
