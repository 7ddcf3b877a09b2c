from typing import Any

import kaldi_native_fbank
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import num_frames
from pretrain.model.blocks import Blocks
from pretrain.model.config import EncoderConfig
from pretrain.model.frontend import (
    CONV_KERNELS,
    CONV_STRIDES,
    FilterbankFrontEnd,
    WaveformFrontEnd,
    log_mel,
    mel_matrix,
)
from tests.reference.convolutions import convolve, randomize

LENGTHS = [400, 719, 720, 5000, 8000]


def front_end(**options: Any) -> WaveformFrontEnd | FilterbankFrontEnd:
    torch.manual_seed(0)
    config = EncoderConfig(**{"conv_dim": 24, "num_mels": 20, **options})
    module = WaveformFrontEnd(config) if config.front_end == "waveform" else FilterbankFrontEnd(config)
    randomize(module)
    return module


def waveforms(lengths: list[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]


def packed(waves: list[Tensor]) -> tuple[Tensor, Layout]:
    return pack([wave.numpy() for wave in waves])


def between(buffer: Tensor, layout: Layout) -> Tensor:
    """Marks the samples that fill the utterances' slots up to multiples of 320."""
    mark = torch.ones(len(buffer), dtype=torch.bool)
    for (first, _), length in zip(layout.slot_bounds, layout.num_samples, strict=True):
        mark[320 * first : 320 * first + length] = False
    return mark


KINDS = [
    {"conv_norm": "group"},
    {"conv_norm": "layer"},
    {"conv_norm": "layer", "conv_bias": True},
    {"front_end": "filterbank"},
]


def test_the_number_of_frames_is_exact_for_every_length() -> None:
    for length in range(400, 2001):
        left = length
        for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
            left = (left - kernel) // stride + 1
        assert num_frames(length) == left


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_front_end_gives_that_number_alone_and_beside_others(kind: dict) -> None:
    module = front_end(**{**kind, "conv_dim": 2, "num_mels": 4})
    lengths = [*range(400, 420), *range(700, 740), *range(1030, 1060), *range(1061, 2000, 31), 2000]
    waves = [torch.ones(length).cumsum(0) / length for length in lengths]
    for wave, length in zip(waves, lengths, strict=True):
        assert module(*packed([wave])).shape == (num_frames(length), module.dim)
    assert module(*packed(waves)).shape == (sum(map(num_frames, lengths)), module.dim)


@pytest.mark.parametrize("kind", KINDS[:3])
@torch.no_grad()
def test_waveform_front_end_equals_a_plain_convolution_stack(kind: dict) -> None:
    module = front_end(**kind)
    assert isinstance(module, WaveformFrontEnd)
    buffer, layout = packed(waveforms())
    for row, wave in zip(layout.split(module(buffer, layout)), waveforms(), strict=True):
        # float32 sums in another order through seven layers; activations are of order 1
        torch.testing.assert_close(row, convolve(module, wave), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("lengths", [[2500], LENGTHS], ids=["alone", "batch"])
def test_waveform_front_end_has_the_gradients_of_a_plain_convolution_stack(
    kind: dict, lengths: list[int]
) -> None:
    # in float64 the two orders of summation agree closely, so the tolerance can be tight
    module = front_end(**kind).double()
    assert isinstance(module, WaveformFrontEnd)
    waves = waveforms(lengths)
    buffer, layout = packed(waves)
    # the group norm's statistics are of the waveform as given
    buffer = buffer.double().requires_grad_(kind["conv_norm"] == "layer")
    weight = torch.randn(layout.total_frames, 24, dtype=torch.float64)
    (module(buffer, layout) * weight).sum().backward()
    ours = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    leaves = [wave.double().requires_grad_() for wave in waves]
    (torch.cat([convolve(module, wave) for wave in leaves]) * weight).sum().backward()
    theirs = [p.grad for p in module.parameters()]
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        # sums over thousands of windows in another order, beside the largest of the tensor
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9 * float(reference.abs().max()))
    if buffer.requires_grad:
        assert buffer.grad is not None
        torch.testing.assert_close(
            buffer.grad[~between(buffer, layout)], torch.cat([wave.grad for wave in leaves])
        )
        assert not buffer.grad[between(buffer, layout)].any()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(400, 3000) | st.sampled_from([640, 960, *LENGTHS]), min_size=1, max_size=5)
)
@torch.no_grad()
def test_an_utterance_has_the_same_frames_alone_and_in_any_batch(kind: dict, lengths: list[int]) -> None:
    module = front_end(**kind)
    buffer, layout = packed(waveforms(lengths))
    for row, wave in zip(layout.split(module(buffer, layout)), waveforms(lengths), strict=True):
        alone = module(*packed([wave]))
        # the same float32 products in matrices of another shape
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gain", [1000.0, float("nan")], ids=["loud", "nan"])
@torch.no_grad()
def test_what_the_neighbours_hold_does_not_matter_to_the_last_bit(kind: dict, gain: float) -> None:
    module = front_end(**kind)
    buffer, layout = packed(waveforms())
    expected = layout.split(module(buffer, layout))
    for number, (first, last) in enumerate(layout.slot_bounds):
        beside = buffer * gain
        beside[320 * first : 320 * last] = buffer[320 * first : 320 * last]
        assert torch.equal(layout.split(module(beside, layout))[number], expected[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.7, float("nan")], ids=["offset", "nan"])
@torch.no_grad()
def test_what_stands_between_utterances_does_not_matter(kind: dict, value: float) -> None:
    module = front_end(**kind)
    buffer, layout = packed(waveforms())
    filled = torch.where(between(buffer, layout), value, buffer)
    assert not torch.equal(filled, buffer)
    assert torch.equal(module(filled, layout), module(buffer, layout))


@torch.no_grad()
def test_base_is_nearly_deaf_to_gain() -> None:
    module = front_end(conv_norm="group")
    wave, layout = packed(waveforms([8000]))
    # eps = 1e-5 of the group norm against channel variances of order 0.01
    torch.testing.assert_close(module(wave, layout), module(3 * wave, layout), rtol=0.05, atol=0.02)


@torch.no_grad()
def test_silence_gives_finite_frames() -> None:
    for kind in KINDS:
        assert front_end(**kind)(*packed([torch.zeros(1000), torch.zeros(400)])).isfinite().all()


@torch.no_grad()
def test_a_filterbank_frame_stacks_the_two_windows_of_its_20_ms() -> None:
    module = front_end(front_end="filterbank")
    assert isinstance(module, FilterbankFrontEnd)
    for length in (400, 559, 560, 719, 720, 880, 4000):
        wave = waveforms([length])[0]
        rows = log_mel(wave, module.window, module.mel)
        assert len(rows) == (length - 400) // 160 + 1
        rows = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
        frames = module(*packed([wave]))
        assert len(frames) == num_frames(length)
        for t, frame in enumerate(frames):
            second = min(2 * t + 1, len(rows) - 1)
            torch.testing.assert_close(frame, torch.cat([rows[2 * t], rows[second]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_click_shows_in_the_frames_whose_windows_hold_it() -> None:
    module = front_end(front_end="filterbank")
    wave = torch.zeros(400 + 320 * 20)
    wave[320 * 10 + 200] = 0.5  # the centre of frame 10's first window
    loud = module(*packed([wave]))[:, :20].mean(1)
    assert int(loud.argmax()) == 10


@pytest.mark.parametrize("num_mels", [80, 40])
def test_log_mel_is_kaldis(num_mels: int) -> None:
    rng = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    wave = (
        0.3 * np.sin(2 * np.pi * 440 * time)
        + 0.1 * np.sin(2 * np.pi * 3000 * time)
        + 0.02 * rng.standard_normal(16000)
        + 0.05
    )
    wave = wave.astype(np.float32)
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0.0, True
    options.mel_opts.num_bins = num_mels
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16000, (wave * 32768).tolist())
    fbank.input_finished()
    expected = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    window = torch.hann_window(400, periodic=False) ** 0.85
    ours = log_mel(torch.from_numpy(wave)[None], window, torch.from_numpy(mel_matrix(num_mels)))[0].numpy()
    assert ours.shape == expected.shape == (98, num_mels)
    # both in float32; energies of order 1e4 to 1e13, logarithms of 10 to 30
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("warp", [0.85, 1.0, 1.2])
def test_a_warped_filterbank_hears_a_tone_where_the_warp_moves_it(warp: float) -> None:
    """Below the knee at 4.8 kHz: a tone of f is heard as one of warp times f; the highest frequency stays."""
    time = torch.arange(8000) / 16000
    window = torch.hann_window(400, periodic=False)
    plain, warped = (torch.from_numpy(mel_matrix(80, warp=factor)) for factor in (1.0, warp))
    for hertz in (300.0, 1000.0, 2500.0):
        heard = log_mel(torch.sin(2 * torch.pi * hertz * time), window, warped).mean(0).argmax()
        moved = log_mel(torch.sin(2 * torch.pi * warp * hertz * time), window, plain).mean(0).argmax()
        assert abs(int(heard) - int(moved)) <= 1  # the bins of the spectrum are 31 Hz apart
    assert (warped[-1] == plain[-1]).all() and (warped >= 0).all() and (warped.sum(0) > 0).all()


@torch.no_grad()
def test_training_with_warp_hears_each_utterance_through_one_drawn_filterbank_and_evaluation_the_plain_one() -> (
    None
):
    module, plain = front_end(front_end="filterbank", warp=0.2), front_end(front_end="filterbank")
    assert isinstance(module, FilterbankFrontEnd) and module.warped is not None
    buffer, layout = packed(waveforms([8000, 5000, 8000]))
    assert torch.equal(module.eval()(buffer, layout), plain(buffer, layout))
    module.train()
    torch.manual_seed(3)
    drawn = torch.randint(21, (3,)).tolist()
    torch.manual_seed(3)
    parts = module._log_mels(buffer, layout)
    for part, (first, _), length, warp in zip(
        parts, layout.slot_bounds, layout.num_samples, drawn, strict=True
    ):
        own = log_mel(buffer[320 * first : 320 * first + length], module.window, module.warped[warp])
        assert torch.equal(part, own)
    torch.manual_seed(3)
    # of two utterances, the first in two blocks
    blocks = module._log_mels(buffer, Blocks(layout.num_samples, (2, 1), (0, 0, 0)))
    assert torch.equal(blocks[0], parts[0]) and torch.equal(
        blocks[1], log_mel(buffer[8000:13000], module.window, module.warped[drawn[0]])
    )
    torch.manual_seed(3)
    first = module(buffer, layout)
    torch.manual_seed(3)
    assert torch.equal(module(buffer, layout), first) and not torch.equal(first, plain(buffer, layout))


def test_warp_is_of_filterbanks() -> None:
    with pytest.raises(ValueError, match="warp is of the filterbank front end; front_end is 'waveform'"):
        EncoderConfig(warp=0.1)
