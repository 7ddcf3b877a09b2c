"""Streaming: an encoder that works chunk by chunk and looks a bounded number of frames ahead.

With `EncoderConfig.streaming` an utterance is cut into chunks of `chunk_frames`. A chunk is computed with the
`look_ahead_frames` after it. These are computed as copies for that chunk alone and dropped after the last
layer, so that the look-ahead does not grow from layer to layer (the hard copy of the right context in
Emformer, arXiv 2010.10759, section 2.2.2; unlike there, nothing summarises what lies further to the left than
`left_chunks`). E = (c + 1) chunk_frames + look_ahead_frames is the first frame that chunk c does not see. A
frame of chunk c depends on:

| part | sees | causal |
| --- | --- | --- |
| convolutions, log-mel windows | the frame's own 400 (stacked log-mel: 560) samples | but for 25 (35) ms |
| statistics over time | everything before the end of the frame's first block | as far as frame E |
| positional convolution | half a kernel to the left; to the right frames before E | as far as frame E |
| attention | chunks c - left_chunks ... c, and the copies behind chunk c | as far as frame E |
| everything else | the frame | yes |

Training and `transcribe` compute all chunks of a batch at once, under a mask. `OnlineEncoder`
(pretrain/model/online.py) computes them one by one as audio arrives, with the same result but for rounding.
In either case `Chunks` is the transformer's side, and `Blocks` (pretrain/model/blocks.py) the front end's:
block b holds the frames that come into sight with chunk b.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.config import StreamingConfig

QUERY_ROWS = 256  # attended at a time, about: more waste products that the mask discards, fewer are slow


class _Rows(NamedTuple):
    """One utterance's rows with the copies, chunk after chunk."""

    frames: np.ndarray  # (rows,) int64
    chunks: np.ndarray  # (rows,) int64
    copies: np.ndarray  # (rows,) bool
    bounds: np.ndarray  # (chunks + 1,) int64: the first row of each chunk, and the number of rows


@lru_cache(maxsize=256)
def _rows(num_frames: int, chunk: int, look_ahead: int) -> _Rows:
    starts = np.arange(0, num_frames, chunk)
    counts = np.minimum(starts + chunk + look_ahead, num_frames) - starts
    chunks = np.repeat(np.arange(len(starts)), counts)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    frames = np.arange(bounds[-1]) - bounds[chunks] + starts[chunks]
    return _Rows(frames, chunks, frames >= starts[chunks] + chunk, bounds)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The rows that the transformer computes: of each utterance and chunk the frames, then the copies."""

    config: StreamingConfig
    num_frames: tuple[int, ...]
    device: torch.device

    @property
    def reach(self) -> int:
        """Frames of a chunk with its look-ahead."""
        return self.config.chunk_frames + self.config.look_ahead_frames

    @cached_property
    def _each(self) -> list[_Rows]:
        size, ahead = self.config.chunk_frames, self.config.look_ahead_frames
        return [_rows(frames, size, ahead) for frames in self.num_frames]

    @property
    def _first_frames(self) -> list[int]:
        return [*accumulate(self.num_frames[:-1], initial=0)]

    @cached_property
    def frames(self) -> Tensor:
        """The frame of the packed batch that each row is: (rows,) int64."""
        each = zip(self._first_frames, self._each, strict=True)
        return self._move(np.concatenate([first + rows.frames for first, rows in each]))

    @cached_property
    def originals(self) -> Tensor:
        """The rows that are no copies, in the order of the frames: (frames,) int64."""
        return self._move(np.flatnonzero(~np.concatenate([rows.copies for rows in self._each])))

    def windows(self, x: Tensor, kernel: int) -> Tensor:
        """The frames of x (frames, dim) in reach of each chunk's convolution: (chunks, window, dim).

        The first output of a window is that of its chunk's first frame. Frames that do not exist or are not
        in sight are zero.
        """
        parts = []
        for first, frames in zip(self._first_frames, self.num_frames, strict=True):
            starts = np.arange(0, frames, self.config.chunk_frames)[:, None]
            taken = starts + np.arange(-(kernel // 2), self.reach + kernel - 1 - kernel // 2)
            in_sight = (taken >= 0) & (taken < np.minimum(starts + self.reach, frames))
            parts.append(np.where(in_sight, taken + first, len(x)))
        rows = np.concatenate(parts)
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return padded.index_select(0, self._move(rows.ravel())).view(*rows.shape, -1)

    def of_windows(self, y: Tensor) -> Tensor:
        """The outputs of `windows` (chunks, chunk and look-ahead frames, dim) that exist: (rows, dim)."""
        counts = np.concatenate([np.diff(rows.bounds) for rows in self._each])
        kept = np.arange(y.shape[1]) < counts[:, None]
        return y.flatten(0, 1).index_select(0, self._move(np.flatnonzero(kept)))

    @cached_property
    def _groups(self) -> list[tuple[slice, slice, Tensor | None]]:
        """Rows of queries, rows of their keys, and the mask of which query attends which key (None: all do).

        Chunks are in groups of like size.
        """
        groups, before = [], 0
        together, left = max(1, QUERY_ROWS // self.reach), self.config.left_chunks
        for rows in self._each:
            number, copy = self._move(rows.chunks), self._move(rows.copies)
            bounds = rows.bounds.tolist()
            for first in range(0, len(bounds) - 1, together):
                start, end = bounds[first], bounds[min(first + together, len(bounds) - 1)]
                oldest = 0 if left is None else bounds[max(first - left, 0)]
                own, others = number[start:end, None], number[None, oldest:end]
                attended = (others == own) | ((others < own) & ~copy[None, oldest:end])
                if left is not None:
                    attended &= others >= own - left
                everything = together == 1 and (self.config.look_ahead_frames == 0 or oldest == start)
                queries, keys = slice(before + start, before + end), slice(before + oldest, before + end)
                groups.append((queries, keys, None if everything else attended))
            before += bounds[-1]
        return groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each row to its chunk, its chunk's copies and the frames of the chunks before it.

        Each is (rows, num_heads, head_dim); returns (rows, dim).
        """
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, num_heads, rows, head_dim)
        outputs = [
            F.scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask)
            for rows, keys, mask in self._groups
        ]
        return torch.cat([y[0].transpose(0, 1) for y in outputs]).flatten(1)

    def _move(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)
