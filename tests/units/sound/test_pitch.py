import numpy as np
import pytest
import torch

from pretrain.data.utterance import num_frames
from units.sound.pitch import patterns, pitch


def buzz(hertz: float, seconds: float = 0.5) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    return sum(np.cos(2 * np.pi * hertz * k * time) / k for k in range(1, 11)).astype(np.float32) * 0.1


@pytest.mark.parametrize("hertz", [70.0, 119.0, 210.5, 345.0])
def test_the_pitch_of_a_buzz_is_found_within_one_per_cent_also_in_noise(hertz: float) -> None:
    wave = buzz(hertz)
    noisy = wave + 0.02 * np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    for sound in (wave, noisy):
        found = pitch(sound)
        assert found.shape == (2 * num_frames(len(sound)),)
        inside = found[5:-5]  # windows that the edges do not cut
        torch.testing.assert_close(inside, torch.full_like(inside, hertz), rtol=0.01, atol=0)


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    assert (pitch(0.1 * noise) == 0).all() and (pitch(np.zeros(8000, np.float32)) == 0).all()


def test_a_change_of_pitch_is_found_where_it_is() -> None:
    wave = np.concatenate([buzz(100, 0.4), buzz(200, 0.4)])
    change = np.flatnonzero((pitch(wave) > 150).numpy())[0]
    assert abs(160 * change + 120 - 6400) <= 512  # half a window


def test_harmonics_show_where_the_bands_are_narrow_and_only_in_voiced_frames() -> None:
    shown = patterns(torch.tensor([[0.0, 100.0], [200.0, 120.0]]))
    assert shown.shape == (2, 2, 80) and (shown[0, 0] == 0).all()
    low, high = shown[1, 0, :25].std(), shown[1, 0, 60:].std()
    assert low > 1 and low > 3 * high
    # beyond the range: its border
    torch.testing.assert_close(patterns(torch.tensor(400.0)), patterns(torch.tensor(900.0)))
