"""Long utterances go through an encoder in windows (quantize/features.py): what that changes, and what
not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import quantize.features
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import Utterance, num_frames
from pretrain.model.encoder import Encoder
from quantize.clustering import ClusterConfig, cluster
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig
from quantize.features import EncoderSource
from tests.pretrain.ctc.tones import save_encoder
from tests.pretrain.model.test_streaming import KINDS, ROUNDING, encoder

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
SECONDS = 30
WINDOWS = (
    230,
    499,
)  # frames: seven windows, and four; the context on each side is the 100 frames of real windows


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Utterance:
    """Tones in noise whose level moves forty-fold, at a constant offset: every window has statistics of its
    own."""
    rng, num_samples = np.random.default_rng(0), SECONDS * 16000 + 123
    path, time = tmp_path_factory.mktemp("long") / "long.wav", np.arange(num_samples) / 16000
    tones = np.repeat(rng.uniform(200, 4000, num_samples // 1600 + 1), 1600)[:num_samples]
    level = (
        np.geomspace(0.005, 0.2, num_samples)
        * np.repeat(rng.uniform(0.3, 1.0, SECONDS + 1), 16000)[:num_samples]
    )
    wave = level * (np.sin(2 * np.pi * tones * time) + 0.3 * rng.standard_normal(num_samples)) + 0.02
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    return Utterance("long", str(path), 0, num_samples, 16000)


def layers_of(
    module: Encoder, utterance: Utterance, window_frames: int, device_path: bool = False
) -> list[np.ndarray]:
    """The features of every layer from windows of at most so many frames."""
    source = EncoderSource(module, "", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize.features, "WINDOW_FRAMES", window_frames)
        numbers = list(range(module.config.num_layers + 1))
        ((_, layers),) = (
            source._in_batches([[utterance]], numbers)
            if device_path
            else source.all_layers([utterance], numbers)
        )
    return layers


def labels_of(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return (np.square(centroids).sum(1) - 2 * features @ centroids.T).argmin(1)


@kinds
@pytest.mark.parametrize("device_path", [False, True], ids=["one by one", "as a GPU does"])
def test_all_but_attention_sees_the_whole_of_a_long_utterance(
    kind: dict[str, Any], device_path: bool, long: Utterance
) -> None:
    """Without attention, features of windows are those of the whole utterance, beside the cuts and far from
    them."""
    module = encoder(None, **kind)
    for layer in module.layers:
        torch.nn.init.zeros_(layer.attention_out.weight)
    whole = layers_of(module, long, 10**6)
    for window_frames in WINDOWS:
        for found, expected in zip(layers_of(module, long, window_frames, device_path), whole, strict=True):
            np.testing.assert_allclose(found, expected, **ROUNDING)


@pytest.mark.parametrize("name", KINDS)
def test_labels_of_a_long_utterance_are_those_of_the_whole_whatever_the_window(
    name: str, long: Utterance
) -> None:
    """What is left is attention, which sees its window. With drawn weights it attends all alike, near and
    far, and the mean of ten seconds is not that of an utterance that grows louder all the time: this is far
    more than with a trained encoder (README). Before, each window had statistics of its own, and 11 %
    (small), 70 % (base) and 40 % (large) of these labels changed."""
    module = encoder(None, **KINDS[name])
    whole = layers_of(module, long, 10**6)
    error, agreement = {"small": (0.08, 0.95), "base": (0.18, 0.85), "large": (0.06, 0.92)}[name]
    for window_frames in WINDOWS:
        windowed = layers_of(module, long, window_frames)
        for layer, (found, expected) in enumerate(zip(windowed, whole, strict=True)):
            assert found.shape == (num_frames(long.length), module.config.dim)
            centroids = expected[:: len(expected) // 20]
            same = (labels_of(found, centroids) == labels_of(expected, centroids)).mean()
            assert np.sqrt(np.square(found - expected).mean()) < (error if layer else 1e-5) * expected.std()
            assert same > (agreement if layer else 0.999)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])  # each imports torch
def test_labels_of_a_long_utterance_depend_on_no_batch_shard_thread_or_process(
    processes: int, tmp_path: Path, long: Utterance
) -> None:
    """With windows as they are, of 100 s."""
    wave, _ = soundfile.read(long.path, dtype="float32")
    rows = []
    for name, num_samples in (("a", 30_000), ("long", 101 * 16000), ("b", 50_000)):
        soundfile.write(tmp_path / f"{name}.wav", np.resize(wave, num_samples), 16000)
        row = {
            "id": name,
            "path": str(tmp_path / f"{name}.wav"),
            "start": 0,
            "num_samples": num_samples,
            "sample_rate": 16000,
        }
        rows.append({**row, "split": "train" if name == "a" else None})
    write_manifest(tmp_path / "manifest", rows, {}, {})
    manifest = str(tmp_path / "manifest")
    run = str(save_encoder(tmp_path / "run", front_end="waveform", conv_norm="group", conv_dim=16))
    codebook = {
        "manifest": manifest,
        "split": "train",
        "features": "encoder",
        "encoder": run,
        "layer": 1,
        "num_classes": 8,
    }
    cluster(ClusterConfig(**codebook, out=str(tmp_path / "codebook"), device="cpu"))
    found, threads = [], torch.get_num_threads()
    options = {"manifest": manifest, "codebook": str(tmp_path / "codebook"), "encoder": run, "device": "cpu"}
    try:
        for number, more in enumerate(
            ({"num_shards": 1}, {"num_shards": 3, "processes": processes, "batch_seconds": 300})
        ):
            torch.set_num_threads(1 + number)
            encode(EncodeConfig(**options, **more, out=str(tmp_path / str(number))))
            labels = Labels(tmp_path / str(number))
            found.append([labels[name] for name in Manifest(manifest).ids])
    finally:
        torch.set_num_threads(threads)
    assert [len(own) for own in found[0]] == [num_frames(row["num_samples"]) for row in rows]
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
