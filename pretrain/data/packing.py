"""Packed batches: utterances end to end, nothing padded.

Each waveform starts on a multiple of 320 samples, the hop of the front end. Frame t of an utterance whose
slot begins at sample 320 g is frame g + t of the whole buffer, whatever lies beside it, so one pass of the
convolutions serves all utterances; the one or two frames at the end of a slot that would reach into the next
utterance are dropped. Behind the front end a batch is (frames, dim), the utterances' frames end to end, and
only attention and the positional convolution depend on where one ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretrain.data.utterance import HOP, num_frames


@dataclass(frozen=True)
class Layout:
    """Where the utterances of a packed batch lie; `num_samples` are their lengths (at least 400).

    It holds integers on the host alone.
    """

    num_samples: tuple[int, ...]

    @cached_property
    def num_frames(self) -> tuple[int, ...]:
        """Frames of each utterance."""
        return tuple(num_frames(length) for length in self.num_samples)

    @property
    def total_frames(self) -> int:
        return sum(self.num_frames)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Length of each utterance's slot in hops of 320 samples."""
        return tuple(-(-length // HOP) for length in self.num_samples)

    @cached_property
    def slot_bounds(self) -> list[tuple[int, int]]:
        """(first, past the last) hop of each slot."""
        return list(pairwise(accumulate(self.slots, initial=0)))

    @cached_property
    def frame_bounds(self) -> list[tuple[int, int]]:
        """(first, past the last) row of each utterance's frames."""
        return list(pairwise(accumulate(self.num_frames, initial=0)))

    def frame_ends(self, device: torch.device) -> Tensor:
        """0 and the end of each utterance's frames, (batch + 1,) int32 on `device`; copied there once."""
        return _to_device((0, *accumulate(self.num_frames)), device)

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """The utterances' own samples (num_samples_i,), views of a packed buffer (samples,)."""
        slots = zip(self.slot_bounds, self.num_samples, strict=True)
        return [buffer[HOP * first : HOP * first + length] for (first, _), length in slots]

    def drop_between(self, x: Tensor) -> Tensor:
        """Rows on the grid of hops (hops or one fewer, channels) to the utterances' own frames."""
        lengths = zip(self.num_frames, self.slots, strict=True)
        sizes = [size for frames, slot in lengths for size in (frames, slot - frames)]
        sizes[-1] -= sum(self.slots) - len(x)
        return torch.cat(x.split(sizes)[::2])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(frames, ...) to one tensor for each utterance."""
        return x.split(self.num_frames)

    def pad(self, x: Tensor) -> Tensor:
        """(frames, ...) to (batch, longest, ...), zero where padded."""
        return pad_sequence(list(self.split(x)), batch_first=True)


@lru_cache(maxsize=8)
def _to_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # a step that trains may use it again
        ends = torch.tensor(values, dtype=torch.int32)
        return ends if device.type == "cpu" else ends.pin_memory().to(device, non_blocking=True)


def pack(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Layout]:
    """Waveforms (samples_i,) float32 to one buffer (samples,), zero between slots, and its layout."""
    layout = Layout(tuple(map(len, waveforms)))
    buffer = torch.zeros(HOP * sum(layout.slots))
    for own, waveform in zip(layout.cut(buffer), waveforms, strict=True):
        own.numpy()[:] = waveform
    return buffer, layout


def pack_padded(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Layout]:
    """(batch, samples) with lengths (batch,) to a packed buffer and its layout, on the same device.

    Padding is not read.
    """
    layout = Layout(tuple(num_samples.tolist()))
    buffer = waveforms.new_zeros(HOP * sum(layout.slots))
    for own, row in zip(layout.cut(buffer), waveforms, strict=True):
        own.copy_(row[: len(own)])
    return buffer, layout
