from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.packing import Layout, pack, pack_padded
from pretrain.data.utterance import num_frames

EDGES = [400, 639, 640, 641, 719, 720, 960, 1039, 1040]  # of slots and of frames
LENGTHS = st.lists(st.integers(400, 3000) | st.sampled_from(EDGES), min_size=1, max_size=6)


def waveforms(lengths: list[int]) -> list[np.ndarray]:
    """No sample is zero and no two are the same."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(first + 1, last + 1, dtype=np.float32) for first, last in pairwise(ends)]


@given(LENGTHS)
def test_a_buffer_holds_every_waveform_on_the_grid_and_zeros_between(lengths: list[int]) -> None:
    waves = waveforms(lengths)
    buffer, layout = pack(waves)
    assert layout == Layout(tuple(lengths)) and buffer.dtype == torch.float32
    # what the grid costs at most
    assert len(buffer) % 320 == 0 and len(buffer) - sum(lengths) <= 319 * len(lengths)
    left, end = buffer.clone(), 0
    for wave, (first, last) in zip(waves, layout.slot_bounds, strict=True):
        assert 320 * first == end and 320 * last - 319 <= 320 * first + len(wave) <= 320 * last
        end = 320 * last
        assert np.array_equal(buffer[320 * first : 320 * first + len(wave)].numpy(), wave)
        left[320 * first : 320 * first + len(wave)] = 0
    assert end == len(buffer) and not left.any()


@given(LENGTHS, st.integers(0, 500))
def test_padded_rows_are_packed_like_the_waveforms_whatever_stands_in_the_padding(
    lengths: list[int], extra: int
) -> None:
    rows = torch.full((len(lengths), max(lengths) + extra), float("nan"))
    for row, wave in zip(rows, waveforms(lengths), strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    buffer, layout = pack_padded(rows, torch.tensor(lengths))
    expected, same = pack(waveforms(lengths))
    assert torch.equal(buffer, expected) and layout == same
    assert all(isinstance(length, int) for length in layout.num_samples)


@given(LENGTHS)
def test_windows_of_the_buffer_without_those_between_are_the_windows_of_each_utterance(
    lengths: list[int],
) -> None:
    """400 samples every 320 are what the front ends make a frame of."""
    waves = waveforms(lengths)
    buffer, layout = pack(waves)
    kept = layout.drop_between(buffer.unfold(0, 400, 320))
    alone = [torch.from_numpy(wave).unfold(0, 400, 320) for wave in waves]
    assert torch.equal(kept, torch.cat(alone))
    assert layout.num_frames == tuple(map(len, alone)) == tuple(map(num_frames, lengths))
    assert layout.total_frames == len(kept)
    for own, part, (first, last) in zip(alone, layout.split(kept), layout.frame_bounds, strict=True):
        assert torch.equal(part, own) and torch.equal(kept[first:last], own)


@given(LENGTHS, st.booleans())
def test_a_frame_keeps_its_place_on_the_grid(lengths: list[int], whole: bool) -> None:
    """Whether the front end gives a row for the last hop of the buffer or, as convolutions do, one fewer."""
    layout = Layout(tuple(lengths))
    grid = torch.arange(sum(layout.slots) - (not whole))[:, None]
    expected = [
        first + t
        for (first, _), frames in zip(layout.slot_bounds, layout.num_frames, strict=True)
        for t in range(frames)
    ]
    assert layout.drop_between(grid).flatten().tolist() == expected


@given(LENGTHS)
def test_padded_rows_are_the_utterances_and_joining_undoes_splitting(lengths: list[int]) -> None:
    layout = Layout(tuple(lengths))
    x = torch.arange(1.0, 2.0 * layout.total_frames + 1).view(-1, 2)
    padded = layout.pad(x)
    assert padded.shape == (len(lengths), max(layout.num_frames), 2)
    for row, part, frames in zip(padded, layout.split(x), layout.num_frames, strict=True):
        assert torch.equal(row[:frames], part) and (row[frames:] == 0).all()
    assert torch.equal(torch.cat(layout.split(x)), x)
    flags = x[:, 0] > 0  # masks have no second dimension
    assert torch.equal(layout.pad(flags), padded[..., 0] > 0) and layout.pad(flags).dtype == torch.bool


def test_frame_ends_are_those_of_the_bounds_in_the_kernels_type() -> None:
    layout = Layout((400, 719, 720, 3000))
    ends = layout.frame_ends(torch.device("cpu"))
    assert ends.dtype == torch.int32 and ends.tolist() == [0, 1, 2, 4, 13]
    assert layout.frame_bounds == list(pairwise(ends.tolist()))
    # every layer asks; one copy for all
    assert Layout(layout.num_samples).frame_ends(torch.device("cpu")) is ends


def test_the_gradient_of_what_lies_between_is_zero() -> None:
    layout = Layout((400, 719, 720))  # slots of 2, 3 and 3 hops; 1, 1 and 2 frames
    grid = torch.ones(8, 2, requires_grad=True)
    layout.drop_between(grid).sum().backward()
    assert grid.grad is not None and grid.grad[:, 0].tolist() == [1, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_type_and_device_are_kept(dtype: torch.dtype, device: str) -> None:
    rows = torch.zeros(2, 1000, dtype=dtype, device=device)
    buffer, layout = pack_padded(rows, torch.tensor([1000, 700]))
    grid = torch.zeros(sum(layout.slots), 3, dtype=dtype, device=device)
    kept = layout.drop_between(grid)
    padded = layout.pad(kept)
    for x in (buffer, kept, padded, *layout.split(kept)):
        assert x.dtype == dtype and x.device.type == device
