"""An encoder that runs while one speaks: chunk by chunk, each as soon as its samples are there (pretrain/model/streaming.py)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP, num_frames
from pretrain.model.encoder import Encoder, LayerConvention
from pretrain.model.streaming import Blocks


class ChunkOutput(NamedTuple):
    """One chunk's frames."""

    last: Tensor  # (frames, dim): the last output, or that of `layer`, as `Encoder.contextualize` returns it
    outputs: list[
        Tensor
    ]  # each (frames, dim): the first layer's input and the features of every layer that runs


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
        q, k, v = (
            part.transpose(0, 1)[None] for part in (query, key, value)
        )  # (1, num_heads, rows, head_dim)
        y = F.scaled_dot_product_attention(q, k, v)
        end = before + self.num_frames
        start = 0 if self.capacity is None else max(end - self.capacity, 0)
        self.keys, self.values = (
            key[start:end].clone(),
            value[start:end].clone(),
        )  # a view would keep the rest alive
        return y[0].transpose(0, 1).flatten(1)


class OnlineEncoder:
    """Takes one utterance in pieces of any size and gives its frames, equal to those of the whole utterance at once but for the
    rounding of matrix products of other shapes.

    What it keeps between chunks is bounded when `left_chunks` is set: samples and projected frames that are still to be seen,
    sums for the statistics over time, and keys and values of the frames to the left. The encoder must be in eval mode. No layer
    beyond `layer` runs (None: all do); `convention` is that of `outputs`, as in `Encoder.extract_packed`.
    """

    def __init__(self, encoder: Encoder, layer: int | None = None, convention: LayerConvention = "residual"):
        if encoder.config.streaming is None:
            raise ValueError(
                "this encoder attends whole utterances and cannot run online; train one with a [streaming] table (chunk_frames, "
                "look_ahead_frames, left_chunks)"
            )
        assert not encoder.training
        self.encoder, self.config = encoder, encoder.config.streaming
        self.layer, self.convention = layer, convention
        self.dtype = torch.int64 if encoder.config.front_end == "units" else torch.float32
        self.device = encoder.mask_embedding.device
        self.reset()

    def reset(self) -> None:
        """Begin another utterance."""
        left = self.config.left_chunks
        self._input = torch.zeros(
            0, dtype=self.dtype, device=self.device
        )  # samples (or units) from the next block's first on
        self._totals: dict[str, Tensor] = {}
        self._blocks = 0
        self._frames: Tensor | None = (
            None  # (frames, dim): projected, from half a kernel before the next chunk on
        )
        self._before = 0  # of those, frames before the next chunk
        self._pasts = [
            _Past(None if left is None else left * self.config.chunk_frames) for _ in self.encoder.layers
        ]

    @torch.no_grad()
    def feed(self, piece: Tensor, last: bool = False) -> Iterator[ChunkOutput]:
        """The chunks that become final with the next samples (samples,) float32 16 kHz, or units (frames,) int64; `last`: the
        utterance ends with them. The iterator must be exhausted before the next call."""
        self._input = torch.cat([self._input, piece.to(self._input)])
        while (block := self._next_block(last)) is not None:
            projected = self.encoder.project(self.encoder.feature_norm(block))
            self._frames = projected if self._frames is None else torch.cat([self._frames, projected])
            if len(self._frames) - self._before >= self.config.chunk_frames + self.config.look_ahead_frames:
                yield self._chunk()
        while last and self._frames is not None and len(self._frames) > self._before:
            yield self._chunk()
        self._input = self._input.clone()  # a view would keep the piece alive

    def _next_block(self, last: bool) -> Tensor | None:
        """Front-end frames of the next block, when it is there."""
        frames = self.config.chunk_frames + (0 if self._blocks else self.config.look_ahead_frames)
        front_end, units = self.encoder.front_end, self.dtype == torch.int64
        hop, needed = (1, frames) if units else (HOP, frames * HOP + front_end.tail)
        own = self._input[:needed]
        if len(own) < needed and not (last and (len(own) if units else num_frames(len(own)))):
            return None
        self._input = self._input[hop * frames :]
        overlap, self._blocks = (front_end.tail if self._blocks else 0), self._blocks + 1
        if units:
            return self.encoder.features(own, Layout(()))
        blocks = Blocks(Layout((len(own),)), (1,), (overlap,), self._totals)
        return self.encoder.block_features(F.pad(own, (0, -len(own) % HOP)), blocks)

    def _chunk(self) -> ChunkOutput:
        """The next chunk of the frames at hand, with as many of its copies as there are."""
        assert self._frames is not None
        kernel, size, before = self.encoder.positional.kernel, self.config.chunk_frames, self._before
        x = self._frames[: before + size + self.config.look_ahead_frames]
        own, frames = x[before:], min(size, len(x) - before)
        window = F.pad(
            x, (0, 0, kernel // 2 - before, kernel - 1 - kernel // 2)
        )  # zeros for what is not there or not in sight
        for past in self._pasts:
            past.num_frames = frames
        outputs: list[Tensor] = []
        originals = torch.arange(frames, device=x.device)
        positions = self.encoder.positional.of_windows(window[None])[0]
        y = self.encoder.transform(
            own + positions, self._pasts, originals, self.layer, outputs, self.convention
        )
        self._before = min(before + frames, kernel // 2)
        self._frames = self._frames[before + frames - self._before :].clone()
        return ChunkOutput(y, outputs)
