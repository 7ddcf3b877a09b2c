"""Statistics over time of an utterance that an encoder sees in windows: sums over all of it, taken before the windows.

The normalisation of waveforms (LARGE), the group norm of BASE's first convolution, and the mean and variance of each mel band belong to
the utterance. A window that took its own would see a loud passage as loud as a soft one, and its features would be others. The sums are
those of streaming (pretrain/model/streaming.py), in float64 and block by block, but all of them come before the first window.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout
from pretrain.data.utterance import HOP
from pretrain.model.encoder import Encoder
from pretrain.model.frontend import UnitFrontEnd, normalize_so_far
from pretrain.model.streaming import Blocks, Windows

BLOCK_FRAMES = 1000  # summed at a time: memory does not grow with the utterance


@torch.no_grad()
def utterance_totals(encoder: Encoder, waveform: np.ndarray) -> dict[str, Tensor] | None:
    """The sums over a whole waveform (samples,) float32 at 16 kHz that `Encoder.features` of its windows needs, on the encoder's device.

    None for an encoder without statistics over time (LayerNorm convolutions without `normalize_waveform`; units), and for a streaming
    one, whose statistics are of what came before.
    """
    config, front_end = encoder.config, encoder.front_end
    if isinstance(front_end, UnitFrontEnd) or config.streaming is not None:
        return None
    totals: dict[str, Tensor] = {}
    if config.normalize_waveform:
        for samples, block in _blocks(encoder, waveform, totals):
            normalize_so_far(samples, block)
    if front_end.has_statistics:
        for samples, block in _blocks(encoder, waveform, totals):
            if config.normalize_waveform:
                samples = normalize_so_far(samples, Windows.of(block.layout, totals))
            front_end.add_up(samples, block)
    return totals or None


def _blocks(
    encoder: Encoder, waveform: np.ndarray, totals: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Blocks]]:
    """The samples of block after block, each a packed batch. The last has what remains, also samples that are too few for a frame."""
    size, tail, device = BLOCK_FRAMES * HOP, encoder.front_end.tail, encoder.mask_embedding.device
    count = max(1, len(waveform) // size)
    for number in range(count):
        start, stop = size * number, len(waveform) if number == count - 1 else size * (number + 1) + tail
        samples = F.pad(torch.from_numpy(waveform[start:stop]), (0, -(stop - start) % HOP))
        yield samples.to(device), Blocks(Layout((stop - start,)), (1,), (tail if number else 0,), totals)
