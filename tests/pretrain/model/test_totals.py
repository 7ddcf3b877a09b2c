from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.packing import pack
from pretrain.data.utterance import HOP, MIN_SAMPLES, num_frames
from pretrain.model import totals
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.frontend import log_mel
from pretrain.model.totals import utterance_totals
from tests.pretrain.model.test_streaming import CHUNKS, KINDS, ROUNDING, encoder

STATISTICS = {**KINDS, "both": {"front_end": "waveform", "conv_norm": "group", "normalize_waveform": True}}
kinds = pytest.mark.parametrize("kind", STATISTICS.values(), ids=STATISTICS.keys())


def swelling(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise that becomes forty times as loud from beginning to end, beside a constant: no window has the
    statistics of the whole."""
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    return (np.geomspace(0.005, 0.2, num_samples) * noise + 0.02).astype(np.float32)


@pytest.mark.parametrize(
    "num_samples", [400, 719, 7 * 320, 14 * 320 + 79, 14 * 320 + 80, 21 * 320 + 399, 16000]
)
def test_totals_added_up_in_blocks_are_those_of_the_whole_utterance(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(totals, "BLOCK_FRAMES", 7)
    wave = swelling(num_samples)
    wide = wave.astype(np.float64)

    found = utterance_totals(encoder(None, **KINDS["large"]), wave)
    assert found is not None and found.keys() == {"waveform"}
    np.testing.assert_allclose(
        found["waveform"][0], [num_samples, wide.sum(), np.square(wide).sum()], rtol=1e-12
    )  # float64

    found = utterance_totals(encoder(None, **KINDS["base"]), wave)
    assert found is not None and found.keys() == {"group_norm"}
    inputs = np.lib.stride_tricks.sliding_window_view(wide, 10)[::5]  # of the first convolution
    expected = [[len(inputs)], inputs.sum(0), (inputs.T @ inputs).ravel()]
    np.testing.assert_allclose(found["group_norm"][0], np.concatenate(expected), rtol=1e-12)

    module = encoder(None, **KINDS["small"])
    found = utterance_totals(module, wave)
    assert found is not None and found.keys() == {"mel"}
    mel = log_mel(torch.from_numpy(wave), module.front_end.window, module.front_end.mel).double().numpy()
    # energies are float32, from products of other shapes
    np.testing.assert_allclose(
        found["mel"][0], np.concatenate([[len(mel)], mel.sum(0), np.square(mel).sum(0)]), rtol=1e-5
    )


def test_totals_of_a_normalised_waveform_s_group_norm_are_of_normalised_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(totals, "BLOCK_FRAMES", 7)
    wave = swelling(9999)
    found = utterance_totals(encoder(None, **STATISTICS["both"]), wave)
    assert found is not None
    normal = (wave - wave.mean(dtype=np.float64)) / np.sqrt(wave.var(dtype=np.float64) + 1e-5)
    inputs = np.lib.stride_tricks.sliding_window_view(normal, 10)[::5]
    # normalised samples are float32
    np.testing.assert_allclose(found["group_norm"][0, 11:], (inputs.T @ inputs).ravel(), rtol=1e-5, atol=1e-2)


@kinds
def test_front_end_frames_of_windows_with_totals_are_those_of_the_whole_utterance(
    kind: dict[str, Any],
) -> None:
    module, wave = encoder(None, **kind), swelling(60 * HOP + 333)
    frames = num_frames(len(wave))
    with torch.no_grad():
        whole = module.features(*pack([wave]))
        windows = [(0, 20), (15, 40), (40, frames)]
        cut = [
            wave[first * HOP : len(wave) if last == frames else (last - 1) * HOP + MIN_SAMPLES]
            for first, last in windows
        ]
        together, found = pack(cut), utterance_totals(module, wave)
        parts = together[1].split(module.features(*together, found))
        alone = together[1].split(module.features(*together))
    for (first, last), part, own in zip(windows, parts, alone, strict=True):
        # the filterbank's last frame stacks a 25 ms window that is not in sight where the utterance is cut
        end = last - first - (last < frames and kind["front_end"] == "filterbank")
        torch.testing.assert_close(part[:end], whole[first : first + end], **ROUNDING)
        # what the windows' own statistics give
        assert (own[:end] - whole[first : first + end]).abs().max() > 0.01


def test_encoders_without_statistics_over_time_or_with_those_of_the_past_have_no_totals() -> None:
    options: dict[str, Any] = {"architecture": "tiny", "num_layers": 1}
    plain = Encoder(EncoderConfig(**options, front_end="waveform", conv_dim=8)).eval()
    units = Encoder(EncoderConfig(**options, front_end="units", num_units=5)).eval()
    for module in (plain, units, *(encoder(CHUNKS[0], **kind) for kind in KINDS.values())):
        assert utterance_totals(module, swelling(2000)) is None
