from typing import Any

import kaldi_native_fbank
import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.audio import num_frames as frames_of_audio
from pretrain.encoder import EncoderConfig
from pretrain.frontend import CONV_KERNELS, CONV_STRIDES, FilterbankFrontEnd, WaveformFrontEnd, log_mel, mel_matrix, num_frames
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


def padded(waves: list[Tensor], extra: int = 0, value: float = 0.0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, waves)) + extra
    rows = [torch.cat([wave, torch.full((longest - len(wave),), value)]) for wave in waves]
    return torch.stack(rows), torch.tensor([len(wave) for wave in waves])


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
        assert num_frames(length) == left == frames_of_audio(length)
    assert torch.equal(num_frames(torch.arange(400, 2001)), torch.tensor([num_frames(n) for n in range(400, 2001)]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_front_end_gives_that_number(kind: dict) -> None:
    module = front_end(**{**kind, "conv_dim": 2, "num_mels": 4})
    for length in [*range(400, 420), *range(700, 740), *range(1030, 1060), *range(1061, 2000, 31), 2000]:
        x = module(torch.ones(2, length).cumsum(1) / length, torch.tensor([length, length]))
        assert x.shape == (2, num_frames(length), module.dim)


@pytest.mark.parametrize("kind", KINDS[:3])
@torch.no_grad()
def test_waveform_front_end_equals_a_plain_convolution_stack(kind: dict) -> None:
    module = front_end(**kind)
    assert isinstance(module, WaveformFrontEnd)
    x = module(*padded(waveforms(), extra=777))
    for row, wave in zip(x, waveforms(), strict=True):
        expected = convolve(module, wave)
        # float32 sums in another order through seven layers; activations are of order 1
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_waveform_front_end_has_the_gradients_of_a_plain_convolution_stack(kind: dict) -> None:
    module = front_end(**kind).double()  # in float64 the two orders of summation agree closely, so the tolerance can be tight
    assert isinstance(module, WaveformFrontEnd)
    wave = waveforms([2500])[0].double()
    weight = torch.randn(num_frames(2500), 24, dtype=torch.float64)
    (module(wave[None], torch.tensor([2500]))[0] * weight).sum().backward()
    ours = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    (convolve(module, wave) * weight).sum().backward()
    theirs = [p.grad for p in module.parameters()]
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        # the folded group norm's scale and shift pass through float32
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_utterance_has_the_same_frames_alone_and_in_any_batch(kind: dict) -> None:
    module = front_end(**kind)
    together = module(*padded(waveforms(), extra=3333))
    for row, wave in zip(together, waveforms(), strict=True):
        alone = module(wave[None], torch.tensor([len(wave)]))[0]
        # the same float32 products in matrices of another shape
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(kind: dict) -> None:
    module = front_end(**kind)
    zeros, lengths = padded(waveforms())
    noise, _ = padded(waveforms(), value=0.7)
    for row, other, length in zip(module(zeros, lengths), module(noise, lengths), lengths.tolist(), strict=True):
        torch.testing.assert_close(row[: num_frames(length)], other[: num_frames(length)], rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_base_is_nearly_deaf_to_gain() -> None:
    module = front_end(conv_norm="group")
    wave, lengths = padded([waveforms([8000])[0]])
    # eps = 1e-5 of the group norm against channel variances of order 0.01
    torch.testing.assert_close(module(wave, lengths), module(3 * wave, lengths), rtol=0.05, atol=0.02)


@torch.no_grad()
def test_silence_gives_finite_frames() -> None:
    for kind in KINDS:
        assert front_end(**kind)(torch.zeros(1, 1000), torch.tensor([1000])).isfinite().all()


@torch.no_grad()
def test_a_filterbank_frame_stacks_the_two_windows_of_its_20_ms() -> None:
    module = front_end(front_end="filterbank")
    assert isinstance(module, FilterbankFrontEnd)
    for length in (400, 559, 560, 719, 720, 880, 4000):
        wave = waveforms([length])[0]
        rows = log_mel(wave[None], module.window, module.mel)[0]
        assert len(rows) == (length - 400) // 160 + 1
        rows = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
        frames = module(wave[None], torch.tensor([length]))[0]
        assert len(frames) == num_frames(length)
        for t, frame in enumerate(frames):
            second = min(2 * t + 1, len(rows) - 1)
            torch.testing.assert_close(frame, torch.cat([rows[2 * t], rows[second]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_click_shows_in_the_frames_whose_windows_hold_it() -> None:
    module = front_end(front_end="filterbank")
    wave = torch.zeros(1, 400 + 320 * 20)
    wave[0, 320 * 10 + 200] = 0.5  # the centre of frame 10's first window
    loud = module(wave, torch.tensor([wave.shape[1]]))[0, :, :20].mean(1)
    assert int(loud.argmax()) == 10


@pytest.mark.parametrize("num_mels", [80, 40])
def test_log_mel_is_kaldis(num_mels: int) -> None:
    rng = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 3000 * time) + 0.02 * rng.standard_normal(16000) + 0.05
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
