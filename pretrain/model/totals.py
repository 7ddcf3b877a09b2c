"""Statistics over time of an utterance that an encoder sees in windows.

The normalisation of waveforms (LARGE), the group norm of BASE's first convolution, and the mean and variance
of each mel band belong to the utterance. A window that took its own would make a loud passage as loud as a
soft one, and its features would be others. So sums over all of the
utterance are taken before the first window, in float64 and block by block, as in streaming
(pretrain/model/blocks.py).
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.utterance import HOP
from pretrain.model.blocks import Blocks, Windows
from pretrain.model.encoder import Encoder
from pretrain.model.frontend import UnitFrontEnd

BLOCK_FRAMES = 1000  # summed at a time: memory does not grow with the utterance


@torch.no_grad()
def utterance_totals(encoder: Encoder, waveform: np.ndarray) -> dict[str, Tensor] | None:
    """The `totals` of `Encoder.features` for a whole waveform (samples,) float32 at 16 kHz.

    Returns None for an encoder without statistics over time (LayerNorm convolutions without
    `normalize_waveform`; units), and for a streaming one, whose statistics are of what came before.
    """
    config, front_end = encoder.config, encoder.front_end
    if isinstance(front_end, UnitFrontEnd) or config.streaming is not None:
        return None
    totals: dict[str, Tensor] = {}
    if config.normalize_waveform:
        for samples, blocks in _blocks(encoder, waveform, totals):
            blocks.normalize(samples)
    if front_end.has_statistics:
        for samples, blocks in _blocks(encoder, waveform, totals):
            if config.normalize_waveform:
                samples = Windows.of(blocks, totals).normalize(samples)
            front_end.add_up(samples, blocks)
    return totals or None


def _blocks(
    encoder: Encoder, waveform: np.ndarray, totals: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Blocks]]:
    """The samples of block after block, each a packed batch; the last has the rest, however short."""
    size, tail, device = BLOCK_FRAMES * HOP, encoder.front_end.tail, encoder.mask_embedding.device
    count = max(1, len(waveform) // size)
    for number in range(count):
        start, stop = size * number, len(waveform) if number == count - 1 else size * (number + 1) + tail
        samples = F.pad(torch.from_numpy(waveform[start:stop]), (0, -(stop - start) % HOP))
        yield samples.to(device), Blocks((stop - start,), (1,), (tail if number else 0,), totals)
