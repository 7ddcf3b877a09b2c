"""Long recordings go through a recogniser in windows (pretrain/ctc/windows.py): what that changes, and what
not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.ctc.model import LoadedRecognizer, Recognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import _log_probs
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.model.config import EncoderConfig
from tests.pretrain.conftest import write_corpus
from tests.pretrain.model.test_streaming import KINDS, ROUNDING
from tests.reference.convolutions import randomize

SECONDS = 20
WINDOWS = (3.0, 7.0)  # seconds; a sixth on each side is more than the positional convolution reaches


def recognizer(kind: str, attends: bool) -> LoadedRecognizer:
    torch.manual_seed(0)
    tree = {"architecture": "tiny", "num_layers": 3, "conv_dim": 24, "num_mels": 20, **KINDS[kind]}
    vocabulary = Vocabulary(symbols=["a", "b", "c", "|"])
    model = Recognizer(EncoderConfig.model_validate(tree), vocabulary, layers="weighted").eval()
    randomize(model.encoder)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # paths that change often
    for layer in () if attends else model.encoder.layers:
        torch.nn.init.zeros_(layer.attention_out.weight)
    return LoadedRecognizer(model, vocabulary, TextConfig(), {}, "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attends", [False, True], ids=["without attention", "with attention"])
def test_a_long_recording_has_the_log_probabilities_of_the_whole_whatever_max_seconds(
    kind: str, attends: bool, tmp_path: Path
) -> None:
    """To rounding, but for attention, which sees its window: with drawn weights it attends everything alike,
    near and far, and the mean of seconds is not that of a recording that grows louder all the time. That is
    far more than with a trained recogniser."""
    rng, num_samples = np.random.default_rng(0), SECONDS * 16000 + 123
    level = (
        np.geomspace(0.005, 0.2, num_samples)
        * np.repeat(rng.uniform(0.3, 1.0, SECONDS + 1), 16000)[:num_samples]
    )
    tones = np.repeat(rng.uniform(200, 4000, num_samples // 1600 + 1), 1600)[:num_samples]
    wave = (
        level
        * (
            np.sin(2 * np.pi * tones * np.arange(num_samples) / 16000)
            + 0.3 * rng.standard_normal(num_samples)
        )
        + 0.02
    )
    manifest = write_corpus(tmp_path, [wave.astype(np.float32)])
    loaded = recognizer(kind, attends)

    def log_probs(max_seconds: float) -> Tensor:
        config = TranscribeConfig(
            out="none",
            manifest="none",
            recognizer="none",
            max_seconds=max_seconds,
            batch_seconds=10,
            device="cpu",
        )
        source = SpeechBatches(manifest, BatchConfig(batch_seconds=10, crop_seconds=1e9), 0, crop=False)
        ((_, found),) = _log_probs(config, loaded, source, torch.device("cpu"), None)
        return found

    whole = log_probs(100)
    for max_seconds in WINDOWS:
        found = log_probs(max_seconds)
        assert found.shape == whole.shape
        if attends:
            # with statistics of each window's own it was 0.32 to 0.69, and 17 to 33 % of the best classes
            # changed
            assert (found - whole).square().mean().sqrt() < 0.13 * whole.std()
            assert (found.argmax(1) == whole.argmax(1)).float().mean() > 0.94
        else:
            torch.testing.assert_close(found, whole, **ROUNDING)
