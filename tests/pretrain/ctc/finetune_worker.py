"""What test_two_processes runs, once in a process alone and once in two.

python -m torch.distributed.run --nproc_per_node 2 tests/pretrain/ctc/finetune_worker.py FOLDER OUT
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.ctc.finetuning import finetune
from pretrain.data.manifest import Manifest
from tests.pretrain.ctc.tones import settings

# Nothing is drawn by rank (dropout); masks are drawn by utterance, the gates of layers by step.
RECIPE: dict[str, Any] = {
    "layers": "weighted",
    "freeze_steps": 4,
    "head_lr_scale": 2.0,
    "layer_drop": 0.4,
    "final_dropout": 0.0,
    "mask_start_probability": 0.02,
    "mask_length": 2,
    "mask_channel_probability": 0.02,
    "mask_channel_length": 8,
}
TRAINING: dict[str, Any] = {
    "max_steps": 14,
    "validate_every": 2,
    "checkpoint_every": 5,
    "keep_checkpoints": 1,
    "patience": 2,
}


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    manifest = Manifest(folder / "manifest")
    on: dict[str, Any] = {
        "ctc": RECIPE,
        "batches": {"batch_seconds": 2.0},
        "budget": "3s",
        "bad_transcripts": "quarantine",
        "characters": "abcd ",
    }
    finetune(settings(folder, manifest, out=str(out / "audio"), **on, training=TRAINING))
    # A rate that is too high for things to get better for long: both stop early, after the same step.
    finetune(
        settings(
            folder,
            manifest,
            out=str(out / "stopped"),
            **on,
            training={**TRAINING, "patience": 1},
            optimizer={"lr": 0.05},
        )
    )
    units = {
        "labels": str(folder / "labels"),
        "units": {"levels": 2},
        "unit_encoder": {"architecture": "tiny", "dropout": 0.0},
    }
    units["unit_encoder"]["input_dropout"] = 0.0  # type: ignore[index]
    finetune(settings(folder, manifest, out=str(out / "units"), **on, **units, training=TRAINING))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
