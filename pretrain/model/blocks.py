"""Statistics over time of what has arrived: the front end's side of streaming, and of windows.

Three normalisations take a mean and a variance over an utterance: that of the waveform (LARGE), the group
norm of the first convolution (BASE), and that of each mel band. An encoder that works in chunks
(pretrain/model/streaming.py) takes them from the utterance's beginning to the end of the present block.
`Blocks` holds one batch of such blocks and computes its statistics from running sums in float64. `Windows`
are parts of one long utterance that share the sums of all of it (pretrain/model/totals.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP, MIN_SAMPLES
from pretrain.model.config import StreamingConfig


@dataclass(frozen=True)
class Blocks(Layout):
    """The layout of a packed batch of blocks: a slot for each block, `num_blocks` blocks for each utterance.

    `overlaps` is the number of samples at a block's beginning that the block before it has, too. `totals` are
    sums over earlier blocks of the only utterance, which are added to (online); it is None where every
    utterance begins here.
    """

    num_blocks: tuple[int, ...]
    overlaps: tuple[int, ...]
    totals: dict[str, Tensor] | None = field(default=None, compare=False)

    def normalize(self, waveforms: Tensor) -> Tensor:
        """Packed samples with zero mean and unit variance; what lies between blocks is zero."""
        parts = self.cut(waveforms)
        new = [part[overlap:].double() for part, overlap in zip(parts, self.overlaps, strict=True)]
        sums = [torch.stack([part.sum(), part.square().sum()]) for part in new]
        mean, scale = self._mean_and_scale("waveform", new, sums)
        y = torch.zeros_like(waveforms)
        for part, own, m, s in zip(parts, self.cut(y), mean.squeeze(1), scale.squeeze(1), strict=True):
            own.copy_((part - m) * s)
        return y

    def window_moments(self, windows: Sequence[Tensor], stride: int) -> tuple[Tensor, Tensor]:
        """Means (blocks, k) and mean outer products (blocks, k, k) of float64 windows (time_i, k)."""
        size = windows[0].shape[1]
        new = [
            part[(overlap - size) // stride + 1 if overlap else 0 :]
            for part, overlap in zip(windows, self.overlaps, strict=True)
        ]
        sums = [torch.cat([part.sum(0), (part.T @ part).flatten()]) for part in new]
        mean, product = self._means("group_norm", new, sums).split([size, size * size], dim=1)
        return mean, product.unflatten(1, (size, size))

    def normalize_bands(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Log-mel energies (windows_i, mel), each band with zero mean and unit variance."""
        wide = [part.double() for part in mels]
        sums = [torch.cat([part.sum(0), part.square().sum(0)]) for part in wide]
        mean, scale = self._mean_and_scale("mel", wide, sums)
        return [((part - m) * s).to(mels[0].dtype) for part, m, s in zip(wide, mean, scale, strict=True)]

    def _mean_and_scale(self, name: str, parts: list[Tensor], sums: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Means and reciprocal deviations (blocks, k), from sums of values and of squares (2 k,)."""
        mean, square = self._means(name, parts, sums).chunk(2, dim=1)
        return mean, torch.rsqrt((square - mean.square()).clamp(min=0) + 1e-5)

    def _means(self, name: str, parts: list[Tensor], sums: list[Tensor]) -> Tensor:
        """Means from the utterance's beginning through each block: (blocks, k), of `sums` (k,) over `parts`.

        The counts go to the device together.
        """
        stacked = torch.stack(sums)
        counts = stacked.new_tensor([len(part) for part in parts])[:, None]
        total = self._through(name, torch.cat([counts, stacked], dim=1))
        return total[:, 1:] / total[:, :1]

    def _through(self, name: str, sums: Tensor) -> Tensor:
        """Sums over each block (blocks, k) to sums from the utterance's beginning through each block."""
        if self.totals is not None:
            self.totals[name] = sums = self.totals.get(name, 0) + sums
            return sums
        return torch.cat([part.cumsum(0) for part in sums.split(self.num_blocks)])


class Windows(Blocks):
    """Windows of one utterance that have the statistics of all of it and add nothing to them."""

    @classmethod
    def of(cls, layout: Layout, totals: dict[str, Tensor]) -> "Windows":
        """The windows that `layout` has slots for, of the utterance with these `totals`."""
        count = len(layout.num_samples)
        return cls(layout.num_samples, (count,), (0,) * count, totals)

    def _through(self, name: str, sums: Tensor) -> Tensor:
        assert self.totals is not None
        return self.totals[name].expand(len(sums), -1)


def block_spans(num_samples: int, config: StreamingConfig, tail: int) -> list[tuple[int, int]]:
    """(first, past the last) sample of each block of an utterance.

    Frame t needs samples 320 t ... 320 (t + 1) + tail; the last frame of an utterance needs 400 samples.
    """
    spans, start, frames = [], 0, config.chunk_frames + config.look_ahead_frames
    while num_samples - start >= MIN_SAMPLES:
        spans.append((start, min(start + frames * HOP + tail, num_samples)))
        start, frames = start + frames * HOP, config.chunk_frames
    return spans


def cut_blocks(
    waveforms: Tensor, layout: Layout, config: StreamingConfig, tail: int
) -> tuple[Tensor, Blocks]:
    """Packed waveforms (samples,) as a packed batch of their blocks, and where those lie."""
    pieces, counts, overlaps = [], [], []
    for utterance in layout.cut(waveforms):
        spans = block_spans(len(utterance), config, tail)
        pieces += [utterance[start:stop] for start, stop in spans]
        counts.append(len(spans))
        overlaps += [0] + [tail] * (len(spans) - 1)
    buffer = torch.cat([F.pad(piece, (0, -len(piece) % HOP)) for piece in pieces])
    return buffer, Blocks(tuple(map(len, pieces)), tuple(counts), tuple(overlaps))
