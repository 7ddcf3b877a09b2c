"""What windows change in the features of a long utterance, layer by layer, beside the utterance at once.

    python -m benchmarks.windows RUN MANIFEST --split test --seconds 300

The utterance is made of a split's, drawn, one after another, at levels that move by up to 20 dB. "own": each
window with the statistics of its own samples, as if it were an utterance. The errors are relative to the
deviation of a layer's features; the labels are those of k-means on the layer's features of the utterance at
once.
"""

import argparse

import numpy as np

from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE, num_frames
from pretrain.data.windows import equal_windows
from quantize import features
from quantize.features import EncoderSource, open_encoder_source

NUM_CLASSES = 100


def long_waveform(manifest: Manifest, seconds: float, seed: int) -> np.ndarray:
    """Drawn utterances end to end, (samples,), each at -15 to +5 dB."""
    rng, parts, left = np.random.default_rng(seed), [], int(seconds * SAMPLE_RATE)
    for item in rng.permutation(len(manifest)).tolist():
        wave = load_audio(manifest[item])[:left] * np.float32(10 ** (rng.uniform(-15, 5) / 20))
        parts.append(wave)
        left -= len(wave)
    if left > 0:
        raise ValueError(f"{manifest.folder}: is {left / SAMPLE_RATE:.0f} s too short; give fewer seconds")
    return np.concatenate(parts)


def in_windows(source: EncoderSource, wave: np.ndarray, layers: list[int], own: bool) -> list[np.ndarray]:
    """The features of `layers` as `EncoderSource` computes them, or with each window's own statistics."""
    totals = None if own else source._totals(wave)
    windows = equal_windows(num_frames(len(wave)), features.WINDOW_FRAMES, features.CONTEXT_FRAMES)
    parts = [source._extract_window(wave, window, layers, totals) for window in windows]
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The class of each row of features (frames, dim)."""
    found: np.ndarray = (np.square(centroids).sum(1) - 2 * features @ centroids.T).argmin(1)
    return found


def clustered(features: np.ndarray, seed: int) -> np.ndarray:
    """Centroids after eight rounds of k-means, (classes, dim)."""
    centroids = features[np.random.default_rng(seed).choice(len(features), NUM_CLASSES, replace=False)]
    for _ in range(8):
        labels = nearest(features, centroids)
        centroids = np.stack(
            [
                features[labels == k].mean(0) if (labels == k).any() else centroids[k]
                for k in range(NUM_CLASSES)
            ]
        )
    return centroids


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("manifest")
    parser.add_argument("--split")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = open_encoder_source(arguments.run, 0, device="cpu")
    wave = long_waveform(
        Manifest(arguments.manifest).select(arguments.split), arguments.seconds, arguments.seed
    )
    layers = list(range(source.encoder.config.num_layers + 1))
    (whole,) = source._extract([wave], layers)
    windowed, own = (in_windows(source, wave, layers, alone) for alone in (False, True))
    print(
        "| layer | error | labels changed | error, own | labels changed, own |\n| --- | --- | --- | --- | "
        "--- |"
    )
    for layer in layers:
        centroids, cells = clustered(whole[layer], arguments.seed), []
        for found in (windowed[layer], own[layer]):
            error = np.sqrt(np.square(found - whole[layer]).mean()) / whole[layer].std()
            changed = (nearest(found, centroids) != nearest(whole[layer], centroids)).mean()
            cells.append(f"{error:.2g} | {100 * changed:.1f} %")
        print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
