"""A corpus from waveforms in memory, and labels that count the frames."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pretrain.data.label_shards import write_shard
from pretrain.data.labels import commit_labels
from pretrain.data.manifest import Manifest, write_manifest

ROOT = Path(__file__).parents[2]


@contextmanager
def run_two_processes(*worker: str | Path, logs: Path, timeout: float) -> Iterator[None]:
    """A worker's command line under torchrun, in two processes beside the body of the `with`; it must
    succeed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--log-dir",
        str(logs),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.Popen(
        [*command, *map(str, worker)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield
        output, _ = two.communicate(timeout=timeout)
    finally:
        two.terminate()  # torchrun ends its processes; nothing happens where they have ended
    assert two.returncode == 0, output[-4000:]


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., Any]:
    return run_two_processes


def write_corpus(
    folder: Path,
    waves: list[np.ndarray],
    *,
    texts: list[str | None] | None = None,
    speakers: list[str] | None = None,
    splits: list[str] | None = None,
) -> Manifest:
    """Utterances u00, u01, … of float waveforms at 16 kHz, all of split train unless told."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, wave in enumerate(waves):
        path = folder / f"u{number:02d}.wav"
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": len(wave),
                "sample_rate": 16000,
                "split": splits[number] if splits else "train",
                "speaker": speakers[number] if speakers else None,
                "text": texts[number] if texts else None,
            }
        )
    write_manifest(folder / "manifest", rows, {}, {})
    return Manifest(folder / "manifest")


def write_labels(folder: Path, counts: dict[str, int], num_classes: int = 5) -> Path:
    """Labels (frame number) mod (number of classes), `counts[id]` of them."""
    write_shard(folder, 0, list(counts), [np.arange(count) % num_classes for count in counts.values()])
    commit_labels(folder, 1, {}, {}, codebook="c0de", num_classes=num_classes)
    return folder


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Manifest]:
    return write_corpus


@pytest.fixture(scope="session")
def make_labels() -> Callable[..., Path]:
    return write_labels
