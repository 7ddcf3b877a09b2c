import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from pretrain.data.utterance import num_frames
from pretrain.model.frontend import mel_matrix
from units.sound.griffin_lim import (
    MARGIN,
    MEL_HOP,
    NUM_MELS,
    griffin_lim,
    linear_magnitudes,
    log_mel,
    num_samples,
    spectral_convergence,
    to_waveform,
)


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    """A gliding buzz with two formants, between stretches of noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * time)) / 16000
    wave = np.zeros_like(time)
    for harmonic in range(1, 40):
        hertz = 120 * harmonic
        wave += np.sin(harmonic * phase) * (
            np.exp(-(((hertz - 600) / 200) ** 2)) + 0.5 * np.exp(-(((hertz - 1700) / 300) ** 2)) + 0.01
        )
    buzzing = np.sin(2 * np.pi * 1.5 * time) > -0.3
    noise = 0.05 * rng.standard_normal(len(time))
    return (0.1 * np.where(buzzing, wave, noise) + 0.001 * noise).astype(np.float32)


@pytest.mark.parametrize("samples", [400, 719, 720, 8000, 8001])
def test_two_mel_frames_belong_to_each_frame_of_the_units(samples: int) -> None:
    mel = log_mel(speechlike(1.0)[:samples])
    assert mel.shape == (2 * num_frames(samples), NUM_MELS)
    sound = to_waveform(mel, iterations=1)
    assert len(sound) == num_samples(num_frames(samples)) and num_frames(len(sound)) == num_frames(samples)


def test_mel_frame_j_is_centred_on_sample_160_j_plus_120() -> None:
    for frame in (0, 7, 19):
        wave = np.zeros(num_samples(10), np.float32)
        wave[MEL_HOP * frame + 120] = 1.0
        loudness = log_mel(wave).exp().sum(1)
        assert loudness.argmax() == frame
        if 0 < frame < 19:
            # float32
            torch.testing.assert_close(loudness[frame - 1], loudness[frame + 1], rtol=1e-4, atol=1e-6)


def test_iterations_bring_the_spectrogram_nearer_and_momentum_sooner() -> None:
    magnitudes = linear_magnitudes(log_mel(speechlike(1.0))).T
    plain = [
        spectral_convergence(griffin_lim(magnitudes, n, momentum=0.0), magnitudes) for n in (0, 1, 4, 16)
    ]
    assert plain == sorted(plain, reverse=True)  # Griffin & Lim 1984: no step without momentum goes away
    assert spectral_convergence(griffin_lim(magnitudes, 16), magnitudes) < plain[-1]


def test_copied_speech_has_nearly_the_spectrogram_it_was_made_of() -> None:
    mel = log_mel(speechlike(2.0))
    again = log_mel(to_waveform(mel))
    decibels = 20 / np.log(10) * (again - mel).abs().mean()
    assert decibels < 1.5  # 0.9 here, 0.7 on synthetic speech; random phases alone are 8 away
    assert 20 / np.log(10) * (log_mel(to_waveform(mel, iterations=0)) - mel).abs().mean() > 3 * decibels


def test_sound_is_a_function_of_the_spectrogram_and_the_seed() -> None:
    mel = log_mel(speechlike(0.5))
    first, again, other = (to_waveform(mel, iterations=3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_magnitudes_fit_the_mel_bands_about_as_well_as_any_that_are_not_negative() -> None:
    mel = log_mel(speechlike(0.5))[5:45:8]
    matrix = mel_matrix(NUM_MELS, fft_size=1024).astype(np.float64)
    found = linear_magnitudes(mel).double().numpy()
    assert found.min() >= 0
    for magnitudes, wanted in zip(found, mel.double().exp().numpy(), strict=True):
        _, least = nnls(matrix.T, wanted)
        # 513 unknowns for 80 bands: the best fit is exact where it is not negative; thirty updates come
        # within 2 %.
        assert np.linalg.norm(magnitudes @ matrix - wanted) < least + 0.02 * np.linalg.norm(wanted)


def test_the_window_before_the_first_sample_and_behind_the_last_are_cut_off() -> None:
    mel = log_mel(speechlike(0.5))
    assert len(to_waveform(mel, 2)) + 2 * MARGIN == MEL_HOP * (len(mel) + 1)


@pytest.mark.parametrize("shape", [(3, NUM_MELS), (0, NUM_MELS), (4, 40)])
def test_what_is_no_spectrogram_of_whole_frames_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"a log-mel spectrogram is \(2 frames, 80\)"):
        to_waveform(torch.zeros(shape))
