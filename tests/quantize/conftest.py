"""Small corpora of tones with alignments, and a run folder holding a tiny untrained encoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from pretrain.data.manifest import write_manifest
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.training.checkpoint import save_checkpoint

TONES = {"sil": 0.0, "aa": 300.0, "iy": 900.0, "ss": 3000.0}


def write_corpus(folder: Path, *, phones: bool = True, num_utterances: int = 12) -> Path:
    """Utterances of random tones, 0.3 to 1.5 s; ids u00…; every fourth is in split dev, the rest in train."""
    rng, rows = np.random.default_rng(0), []
    for number in range(num_utterances):
        pieces, alignment, time = [], [], 0.0
        for _ in range(int(rng.integers(2, 8))):
            phone, seconds = str(rng.choice(list(TONES))), float(rng.uniform(0.15, 0.2))
            samples = np.arange(round(seconds * 16000))
            pieces.append(0.2 * np.sin(2 * np.pi * TONES[phone] * samples / 16000))
            alignment.append((time, time + len(samples) / 16000, phone))
            time += len(samples) / 16000
        wave = np.concatenate(pieces) + 0.003 * rng.standard_normal(sum(map(len, pieces)))
        path = folder / f"u{number:02d}.wav"
        soundfile.write(path, wave, 16000, subtype="PCM_16")
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": len(wave),
                "sample_rate": 16000,
                "split": "dev" if number % 4 == 3 else "train",
                "phones": alignment if phones else None,
            }
        )
    write_manifest(folder / "manifest", rows, {}, {})
    return folder / "manifest"


def write_speech(
    folder: Path, speakers: list[str | None], *, phones: bool = True, num_utterances: int = 18
) -> str:
    """Utterances of twelve tones each, a speaker's a little higher than another's: enough for triphones to
    come again."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_utterances):
        speaker = speakers[number % len(speakers)]
        spoken = ["sil", *rng.choice(list(TONES)[1:], 11).tolist()]
        times = np.arange(1280) / 16000
        pitch = 1 + 0.1 * (number % len(speakers))
        wave = np.concatenate([0.2 * np.sin(2 * np.pi * TONES[phone] * pitch * times) for phone in spoken])
        soundfile.write(
            folder / f"u{number:02}.wav",
            wave + 0.003 * rng.standard_normal(len(wave)),
            16000,
            subtype="PCM_16",
        )
        alignment = [(0.08 * place, 0.08 * (place + 1), phone) for place, phone in enumerate(spoken)]
        rows.append(
            {
                "id": f"u{number:02}",
                "path": str(folder / f"u{number:02}.wav"),
                "start": 0,
                "num_samples": len(wave),
                "sample_rate": 16000,
                "speaker": speaker,
                "phones": alignment if phones else None,
            }
        )
    write_manifest(folder / "manifest", rows, {}, {})
    return str(folder / "manifest")


def write_run(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = EncoderConfig(architecture="tiny")
    model = nn.Module()
    model.encoder = Encoder(config)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"kind": "pretraining", "config": {"encoder": config.resolved()}, "extra": {}}
    save_checkpoint(folder, 1, model, optimizer, state)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_speech(tmp_path_factory.mktemp("speech"), ["ann", "bob", "eve"])


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "encoder")


@pytest.fixture
def make_corpus() -> Callable[..., Path]:
    return write_corpus


@pytest.fixture
def make_speech() -> Callable[..., str]:
    return write_speech


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run
