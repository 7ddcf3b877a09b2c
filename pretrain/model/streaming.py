"""Streaming: an encoder that works chunk by chunk, looks a bounded number of frames ahead, and can run while one speaks.

With `EncoderConfig.streaming` an utterance is cut into chunks of `chunk_frames`. A chunk is computed with the `look_ahead_frames`
after it, which are computed as copies for it alone and dropped after the last layer, so that the look-ahead does not grow from
layer to layer (the hard copy of the right context in Emformer, arXiv 2010.10759, section 2.2.2; unlike there, nothing summarises
what lies further to the left than `left_chunks`). What a frame of chunk c depends on, with E = (c + 1) chunk_frames +
look_ahead_frames the first frame that chunk c does not see:

| part | sees | causal |
| --- | --- | --- |
| convolutions, log-mel windows | the frame's own 400 (stacked log-mel: 560) samples | but for 25 (35) ms |
| statistics over time: GroupNorm of BASE, mel normalisation, normalize_waveform | everything before the end of the block of frames that first came into sight together with the frame | as far as frame E |
| positional convolution | half a kernel to the left; to the right frames before E, zeros beyond | as far as frame E |
| attention | chunks c - left_chunks ... c, and the copies behind chunk c | as far as frame E |
| everything else | the frame | yes |

In training and in `transcribe` all chunks of a batch are computed at once, under a mask; `OnlineEncoder` (pretrain/model/online.py) computes
them one by one as audio arrives, with the same result but for rounding. `Blocks` are the front end's work in either case: block b
holds the frames that come into sight with chunk b. `Chunks` is the transformer's.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain.config import Config
from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP, MIN_SAMPLES

QUERY_ROWS = 256  # attended at a time, about: more waste products that the mask discards, fewer are many small products
FRAME_MS = 20.0


class StreamingConfig(Config):
    """What of an utterance an encoder sees at a time, in frames of 20 ms."""

    chunk_frames: int = Field(gt=0, description="computed together")
    look_ahead_frames: int = Field(0, ge=0, description="beyond a chunk's end that it may see")
    left_chunks: int | None = Field(
        None, ge=0, description="before a chunk that it attends; all when not given, and memory grows"
    )

    def latency_ms(self, tail: int) -> dict[str, float]:
        """Algorithmic latency: how long after a frame's first sample the samples that its output needs are there, the worst and the
        mean over a chunk's frames; `tail`: samples that the front end needs beyond the last hop."""
        rest = self.look_ahead_frames * FRAME_MS + tail / 16
        return {
            "worst": self.chunk_frames * FRAME_MS + rest,
            "mean": (self.chunk_frames + 1) / 2 * FRAME_MS + rest,
        }


class Attending(Protocol):
    """Where the rows of a transformer layer lie, when it is not a Layout's utterances that attend themselves."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each (rows, num_heads, head_dim) -> (rows, dim)."""


@dataclass(frozen=True)
class Blocks:
    """The front end's work on a packed batch: `layout` has a slot for each block, `num_blocks` blocks for each utterance.

    `overlaps`: samples at a block's beginning that are in the block before it, too. `totals`: sums of earlier blocks of the
    only utterance, which are added to and updated (online); None where every utterance begins here.
    """

    layout: Layout
    num_blocks: tuple[int, ...]
    overlaps: tuple[int, ...]
    totals: dict[str, Tensor] | None = field(default=None, compare=False)

    def through(self, name: str, sums: Tensor) -> Tensor:
        """Sums of something over each block (blocks, k) float64 to sums from the utterance's beginning through each block."""
        if self.totals is not None:
            self.totals[name] = sums = self.totals.get(name, 0) + sums
            return sums
        return torch.cat([part.cumsum(0) for part in sums.split(self.num_blocks)])


class Windows(Blocks):
    """Windows of one utterance, that each have the statistics of all of it (pretrain/model/totals.py) and add nothing to them."""

    @classmethod
    def of(cls, layout: Layout, totals: dict[str, Tensor]) -> "Windows":
        """The windows that `layout` has slots for, of the utterance with these `totals`."""
        count = len(layout.num_samples)
        return cls(layout, (count,), (0,) * count, totals)

    def through(self, name: str, sums: Tensor) -> Tensor:
        assert self.totals is not None
        return self.totals[name].expand(len(sums), -1)


def block_spans(num_samples: int, config: StreamingConfig, tail: int) -> list[tuple[int, int]]:
    """(first, past the last) sample of each block of an utterance, where a frame t needs samples 320 t ... 320 (t + 1) + tail of it;
    only its last frame may do with 400."""
    spans, start, frames = [], 0, config.chunk_frames + config.look_ahead_frames
    while num_samples - start >= MIN_SAMPLES:
        spans.append((start, min(start + frames * HOP + tail, num_samples)))
        start, frames = start + frames * HOP, config.chunk_frames
    return spans


def cut_blocks(
    waveforms: Tensor, layout: Layout, config: StreamingConfig, tail: int
) -> tuple[Tensor, Blocks]:
    """Packed waveforms (samples,) as a packed batch of their blocks, and where those lie."""
    pieces, lengths, counts, overlaps = [], [], [], []
    for (first, _), num_samples in zip(layout.slot_bounds, layout.num_samples, strict=True):
        spans = block_spans(num_samples, config, tail)
        for start, stop in spans:
            piece = waveforms[HOP * first + start : HOP * first + stop]
            pieces.append(F.pad(piece, (0, -len(piece) % HOP)))
            lengths.append(len(piece))
        counts.append(len(spans))
        overlaps += [0] + [tail] * (len(spans) - 1)
    return torch.cat(pieces), Blocks(Layout(tuple(lengths)), tuple(counts), tuple(overlaps))


@lru_cache(maxsize=256)
def _rows(
    num_frames: int, chunk: int, look_ahead: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of one utterance with its copies, chunk after chunk: frame, chunk and whether a copy of each row, and the first row of
    each chunk with the number of rows after it, all int64 but the third."""
    starts = np.arange(0, num_frames, chunk)
    counts = np.minimum(starts + chunk + look_ahead, num_frames) - starts
    chunks = np.repeat(np.arange(len(starts)), counts)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    frames = np.arange(bounds[-1]) - bounds[chunks] + starts[chunks]
    return frames, chunks, frames >= starts[chunks] + chunk, bounds


@dataclass(frozen=True, eq=False)
class Chunks:
    """The rows that the transformer computes for a packed batch: for each utterance and chunk its frames, then its copies."""

    config: StreamingConfig
    num_frames: tuple[int, ...]
    device: torch.device

    @cached_property
    def _each(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        return [
            _rows(frames, self.config.chunk_frames, self.config.look_ahead_frames)
            for frames in self.num_frames
        ]

    @cached_property
    def _rows_before(self) -> list[int]:
        return [*accumulate((len(rows[0]) for rows in self._each), initial=0)]

    @cached_property
    def frames(self) -> Tensor:
        """The frame of the packed batch that each row is: (rows,) int64."""
        offsets = accumulate(self.num_frames, initial=0)
        return self._move(
            np.concatenate([offset + rows[0] for offset, rows in zip(offsets, self._each, strict=False)])
        )

    @cached_property
    def originals(self) -> Tensor:
        """The rows that are no copies, in the order of the frames: (frames,) int64."""
        return self._move(np.flatnonzero(~np.concatenate([rows[2] for rows in self._each])))

    def windows(self, x: Tensor, kernel: int) -> Tensor:
        """What a convolution of `kernel` taps over time may see of x (frames, dim), for each chunk: (chunks, window, dim).

        The first output of a window is of its chunk's first frame. Zeros stand for what is not there or not in sight.
        """
        size, reach = self.config.chunk_frames, self.config.chunk_frames + self.config.look_ahead_frames
        offsets, parts = accumulate(self.num_frames, initial=0), []
        for offset, frames in zip(offsets, self.num_frames, strict=False):
            starts = np.arange(0, frames, size)[:, None]
            taken = starts + np.arange(-(kernel // 2), reach + kernel - 1 - kernel // 2)
            seen = (taken >= 0) & (taken < np.minimum(starts + reach, frames))
            parts.append(np.where(seen, taken + offset, len(x)))
        taken = np.concatenate(parts)
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return padded.index_select(0, self._move(taken.ravel())).view(*taken.shape, -1)

    def of_windows(self, y: Tensor) -> Tensor:
        """The outputs of `windows` (chunks, chunk and look-ahead frames, dim) that exist, as rows: (rows, dim)."""
        counts = np.concatenate([np.diff(rows[3]) for rows in self._each])
        kept = np.arange(y.shape[1]) < counts[:, None]
        return y.flatten(0, 1).index_select(0, self._move(np.flatnonzero(kept)))

    @cached_property
    def _groups(self) -> list[tuple[slice, slice, Tensor | None]]:
        """Rows that ask, the rows they ask, and which of those each sees (None: all): chunks in groups of like size."""
        groups = []
        together = max(1, QUERY_ROWS // (self.config.chunk_frames + self.config.look_ahead_frames))
        left = self.config.left_chunks
        for before, (_, chunks, copies, bounds) in zip(self._rows_before, self._each, strict=False):
            number, copy = self._move(chunks), self._move(copies)
            for first in range(0, len(bounds) - 1, together):
                asking = slice(int(bounds[first]), int(bounds[min(first + together, len(bounds) - 1)]))
                asked = slice(int(bounds[max(first - left, 0)]) if left is not None else 0, asking.stop)
                own, others = number[asking, None], number[None, asked]
                seen = (others == own) | ((others < own) & ~copy[None, asked])
                if left is not None:
                    seen &= others >= own - left
                everything = together == 1 and (
                    self.config.look_ahead_frames == 0 or asked.start == asking.start
                )
                groups.append(
                    (_shifted(asking, before), _shifted(asked, before), None if everything else seen)
                )
        return groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each row to its chunk, its chunk's copies and the frames of the chunks before it: each (rows, num_heads,
        head_dim) -> (rows, dim)."""
        query, key, value = (
            part.transpose(0, 1) for part in (query, key, value)
        )  # (num_heads, rows, head_dim)
        outputs = []
        for asking, asked, seen in self._groups:
            y = F.scaled_dot_product_attention(
                query[None, :, asking], key[None, :, asked], value[None, :, asked], seen
            )
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    def _move(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
