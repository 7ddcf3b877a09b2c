"""Speech that a tiny recogniser learns in seconds: every character is a tone. And the smallest of
`finetune`'s settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import commit_labels
from pretrain.data.manifest import Manifest
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.training.checkpoint import save_checkpoint

TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 3100.0, " ": 0.0}
TEXTS = ["ab cd", "da", "bb ca", "cab"]
SAMPLES = 2400  # of a character: 0.15 s


def spell(text: str, seed: int = 0) -> np.ndarray:
    """Every character a tone of 0.15 s, with a little noise."""
    time = np.arange(SAMPLES) / 16000
    wave = np.concatenate([0.2 * np.sin(2 * np.pi * TONES[c] * time) for c in text])
    return (wave + 0.002 * np.random.default_rng(seed).standard_normal(len(wave))).astype(np.float32)


def tone_labels(
    folder: Path, manifest: Manifest, said: list[str], levels: int = 1, codebook: str = "c0de"
) -> Path:
    """Which of the five tones is at the centre of each frame, as labels; further levels hold the frame's
    number modulo five."""
    labels = []
    for text, frames in zip(said, manifest.num_frames.tolist(), strict=True):
        tones = ["abcd ".index(text[(320 * frame + 200) // SAMPLES]) for frame in range(frames)]
        labels.append(np.stack([tones, *[np.arange(frames) % 5] * (levels - 1)], axis=1))
    write_shard(folder, 0, manifest.ids, [label[:, 0] if levels == 1 else label for label in labels])
    commit_labels(folder, 1, {}, {}, codebook=codebook, num_classes=5, num_levels=levels)
    return folder


def save_encoder(run: Path, **changes: Any) -> Path:
    """A pretraining run of a tiny encoder as it is drawn."""
    torch.manual_seed(0)
    tree = {"architecture": "tiny", "dropout": 0.0, "input_dropout": 0.0, **changes}
    model = torch.nn.Module()
    model.encoder = Encoder(EncoderConfig.model_validate(tree))
    state = {"kind": "encoder", "config": {"encoder": model.encoder.config.resolved()}, "extra": {}}
    save_checkpoint(run, 1, model, torch.optim.AdamW(model.parameters()), state)
    return run


def settings(folder: Path, manifest: Manifest, **changes: Any) -> FinetuneConfig:
    """Four steps from `folder`/encoder into `folder`/recognizer without masks and dropout; tables among
    `changes` are merged."""
    tree: dict[str, Any] = {
        "out": str(folder / "recognizer"),
        "manifest": str(manifest.folder),
        "encoder": str(folder / "encoder"),
        "optimizer": {"lr": 5e-3},
        "ctc": {"mask_start_probability": 0.0, "mask_channel_probability": 0.0, "final_dropout": 0.0},
        "training": {"max_steps": 4, "log_every": 2, "device": "cpu"},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    if tree.get("labels"):
        del tree["encoder"]
    return FinetuneConfig.model_validate_json(json.dumps(tree))


MakeCorpus = Callable[..., Manifest]
