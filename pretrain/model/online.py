"""An encoder that runs while one speaks: chunk by chunk, each as soon as its samples are there.

pretrain/model/streaming.py describes what a chunk depends on.
"""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP, num_frames
from pretrain.model.blocks import Blocks
from pretrain.model.config import LayerConvention
from pretrain.model.encoder import Context, Encoder


class _Past:
    """Keys and values of the frames that a layer's next chunk attends, at most `capacity` (None: all)."""

    def __init__(self, capacity: int | None):
        self.capacity, self.num_frames = capacity, 0  # of a chunk, without its copies
        self.keys: Tensor | None = None  # (frames, num_heads, head_dim)
        self.values: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        before = 0
        if self.keys is not None and self.values is not None:
            before = len(self.keys)
            key, value = torch.cat([self.keys, key]), torch.cat([self.values, value])
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, num_heads, rows, head_dim)
        y = F.scaled_dot_product_attention(q, k, v)
        end = before + self.num_frames
        start = 0 if self.capacity is None else max(end - self.capacity, 0)
        # Clones: a view would keep the rest alive.
        self.keys, self.values = key[start:end].clone(), value[start:end].clone()
        return y[0].transpose(0, 1).flatten(1)


class OnlineEncoder:
    """Takes one utterance in pieces of any size and gives its frames.

    They equal those of the whole utterance at once but for the rounding of matrix products of other shapes.
    The memory between chunks is bounded when `left_chunks` is set: samples and projected frames for later
    chunks, sums for the statistics over time, and keys and values of the frames to the left. The encoder must
    be in eval mode. `layers` and `convention` are those of `Encoder.contextualize`.
    """

    def __init__(
        self, encoder: Encoder, layers: Collection[int] = (), convention: LayerConvention = "residual"
    ):
        if encoder.config.streaming is None:
            raise ValueError(
                "this encoder attends whole utterances and cannot run online; train one with a [streaming] "
                "table (chunk_frames, look_ahead_frames, left_chunks)"
            )
        assert not encoder.training
        self.encoder, self.config = encoder, encoder.config.streaming
        self.layers, self.convention = layers, convention
        self.dtype = torch.int64 if encoder.config.front_end == "units" else torch.float32
        self.device = encoder.mask_embedding.device
        self.reset()

    def reset(self) -> None:
        """Begin another utterance."""
        left, device = self.config.left_chunks, self.device
        capacity = None if left is None else left * self.config.chunk_frames
        # Samples (or units) from the next block's first on.
        self._input = torch.zeros(0, dtype=self.dtype, device=device)
        self._totals: dict[str, Tensor] = {}
        self._blocks = 0
        # (frames, dim): projected, from half a kernel before the next chunk on
        self._frames = torch.zeros(0, self.encoder.config.dim, device=device)
        self._before = 0  # of those, frames before that chunk
        self._pasts = [_Past(capacity) for _ in self.encoder.layers]

    @torch.no_grad()
    def feed(self, piece: Tensor, last: bool = False) -> Iterator[Context]:
        """The chunks that become final with the next samples (samples,), or units (frames,) int64.

        Samples are float32 at 16 kHz. `last` ends the utterance. The iterator must be exhausted before the
        next call.
        """
        self._input = torch.cat([self._input, piece.to(self._input)])
        size, ahead = self.config.chunk_frames, self.config.look_ahead_frames
        while (block := self._next_block(last)) is not None:
            self._frames = torch.cat([self._frames.to(block), block])
            if len(self._frames) - self._before >= size + ahead:
                yield self._chunk()
        while last and len(self._frames) > self._before:
            yield self._chunk()
        self._input = self._input.clone()  # a view would keep the piece alive

    def _next_block(self, last: bool) -> Tensor | None:
        """Projected frames (frames, dim) of the next block; None where its samples are missing."""
        frames = self.config.chunk_frames + (0 if self._blocks else self.config.look_ahead_frames)
        tail, units = self.encoder.front_end.tail, self.dtype == torch.int64
        hop, needed = (1, frames) if units else (HOP, frames * HOP + tail)
        own = self._input[:needed]
        if len(own) < needed and not (last and (len(own) if units else num_frames(len(own)))):
            return None
        self._input = self._input[hop * frames :]
        overlap, self._blocks = (tail if self._blocks else 0), self._blocks + 1
        if units:
            return self.encoder.embed(own, Layout(()))
        blocks = Blocks((len(own),), (1,), (overlap,), self._totals)
        return self.encoder.embed(F.pad(own, (0, -len(own) % HOP)), blocks)

    def _chunk(self) -> Context:
        """The next chunk of the frames at hand, with as many of its copies as there are."""
        kernel, size, before = self.encoder.positional.kernel, self.config.chunk_frames, self._before
        x = self._frames[: before + size + self.config.look_ahead_frames]
        frames = min(size, len(x) - before)
        # Frames that do not exist or are not in sight are zero.
        window = F.pad(x, (0, 0, kernel // 2 - before, kernel - 1 - kernel // 2))
        for past in self._pasts:
            past.num_frames = frames
        rows = x[before:] + self.encoder.positional.of_windows(window[None])[0]
        originals = torch.arange(frames, device=x.device)
        context = self.encoder.transform(rows, self._pasts, originals, self.layers, self.convention)
        self._before = min(before + frames, kernel // 2)
        self._frames = self._frames[before + frames - self._before :].clone()
        return context
