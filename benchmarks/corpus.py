"""The audio that contenders share: drawn from a seed, written once, read by each.

`waveforms.npy` int16 and `labels.npy` uint16 hold the utterances end to end, `lengths.npy` their samples: all
that a peer in another Python needs. Ours reads the same samples from 16-bit wav files through a manifest, and
the labels from a labels folder.
"""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SAMPLE_RATE = 16000
MIXED_SECONDS = (1.0, 20.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what the corpus is."""
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of an utterance, and of its share of a batch"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="a batch has at most BATCH times SECONDS of audio, padding included",
    )
    parser.add_argument(
        "--lengths", choices=["equal", "mixed"], default="equal", help="mixed: log-uniform from 1 to 20 s"
    )
    parser.add_argument(
        "--total-seconds", type=float, help="audio in a round; by default one batch (20 on a GPU), mixed four"
    )


def resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those arguments as settings, with the audio of a batch and of a round."""
    if arguments.seconds < 0.025 or arguments.batch < 1:
        raise ValueError(
            f"--seconds {arguments.seconds} --batch {arguments.batch}: at least 0.025 s and one utterance "
            "are needed"
        )
    batches = 4 if arguments.lengths == "mixed" else 20 if arguments.device == "cuda" else 1
    given = {name: getattr(arguments, name) for name in ("seconds", "batch", "lengths")}
    batch_seconds = arguments.batch * arguments.seconds
    total_seconds = arguments.total_seconds or batches * batch_seconds
    return {**given, "batch_seconds": batch_seconds, "total_seconds": total_seconds}


def draw_lengths(kind: str, seconds: float, total_seconds: float, seed: int) -> np.ndarray:
    """Samples of each utterance. `equal`: all `seconds` long; `mixed`: log-uniform from 1 to 20 s. About
    `total_seconds` in all."""
    if kind == "equal":
        return np.full(max(1, round(total_seconds / seconds)), round(seconds * SAMPLE_RATE))
    rng = np.random.default_rng([seed, 3])
    lengths: list[int] = []
    while sum(lengths) < total_seconds * SAMPLE_RATE:
        lengths.append(round(np.exp(rng.uniform(*np.log(MIXED_SECONDS))) * SAMPLE_RATE))
    return np.array(lengths)


def write_corpus(folder: Path, lengths: np.ndarray, num_classes: int, seed: int) -> None:
    """Noise whose colour and level change every tenth of a second, and labels that stay for a few frames."""
    import soundfile

    from pretrain.data.label_shards import write_shard
    from pretrain.data.labels import commit_labels
    from pretrain.data.manifest import write_manifest

    rng = np.random.default_rng([seed, 4])
    waveforms, labels, rows = [], [], []
    for number, length in enumerate(lengths.tolist()):
        noise = rng.standard_normal(length + 1)
        pieces = np.arange(length) // 1600
        colour, level = rng.uniform(-0.9, 0.9, pieces[-1] + 1), 10 ** rng.uniform(-2.5, -1, pieces[-1] + 1)
        wave = (noise[1:] + colour[pieces] * noise[:-1]) * level[pieces]
        waveforms.append(np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16))
        frames = (length - 400) // 320 + 1
        labels.append(
            np.repeat(rng.integers(num_classes, size=frames // 3 + 1), 3)[:frames].astype(np.uint16)
        )
        path = folder / f"u{number:05d}.wav"
        soundfile.write(path, waveforms[-1], SAMPLE_RATE, subtype="PCM_16")
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": length,
                "sample_rate": SAMPLE_RATE,
            }
        )
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "waveforms.npy", np.concatenate(waveforms))
    np.save(folder / "labels.npy", np.concatenate(labels))
    write_manifest(folder / "manifest", rows, {}, {})
    write_shard(folder / "labels", 0, [row["id"] for row in rows], labels)
    commit_labels(folder / "labels", 1, {}, {}, codebook="drawn", num_classes=num_classes)


def describe(lengths: np.ndarray) -> dict[str, Any]:
    """For the report."""
    seconds = lengths / SAMPLE_RATE
    return {
        "utterances": len(lengths),
        "audio_seconds": float(seconds.sum()),
        "longest_seconds": float(seconds.max()),
    }


class Audio(NamedTuple):
    """Utterances as a peer reads them: float32 waveforms in [-1, 1], int64 labels."""

    waveforms: list[np.ndarray]
    labels: list[np.ndarray]


def read_corpus(folder: Path) -> Audio:
    """What `write_corpus` wrote."""
    lengths = np.load(folder / "lengths.npy")
    ends = np.cumsum(lengths)[:-1]
    waveforms = np.split(np.load(folder / "waveforms.npy").astype(np.float32) / 32768, ends)
    frames = (lengths - 400) // 320 + 1
    return Audio(waveforms, np.split(np.load(folder / "labels.npy").astype(np.int64), np.cumsum(frames)[:-1]))


def digest(waveforms: Iterable[np.ndarray]) -> str:
    """sha256 of float32 samples in utterance order."""
    sha = hashlib.sha256()
    for waveform in waveforms:
        assert waveform.dtype == np.float32
        sha.update(waveform.tobytes())
    return sha.hexdigest()


def plan_padded(lengths: np.ndarray, batch_seconds: float) -> list[np.ndarray]:
    """Peers' batches: utterances of like length together (they all advise it), at most so much audio with
    padding."""
    batches: list[list[int]] = []
    for item in np.argsort(lengths, kind="stable").tolist():
        if batches and lengths[item] * (len(batches[-1]) + 1) <= batch_seconds * SAMPLE_RATE:
            batches[-1].append(item)
        else:
            batches.append([item])
    return [np.array(batch) for batch in batches]


def pad(arrays: list[np.ndarray]) -> np.ndarray:
    """(batch, longest), zeros behind."""
    out = np.zeros((len(arrays), max(map(len, arrays))), dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
