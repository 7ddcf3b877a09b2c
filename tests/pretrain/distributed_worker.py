"""What test_distributed runs, once in a process alone and once in two: every scenario, one after another.

python -m torch.distributed.run --nproc_per_node 2 tests/pretrain/distributed_worker.py CORPUS OUT
"""

import sys
from pathlib import Path

import torch

from pretrain.engine import TrainingConfig
from pretrain.pretraining import PretrainConfig, pretrain
from tests.pretrain.linear_task import LinearTask, run_linear


def hubert(corpus: Path, out: Path, *, accumulate: int = 1, encoder: dict | None = None) -> None:
    """Batches of about three utterances, one of them of a single one; validation is one batch, so one rank has none."""
    still = {"input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = PretrainConfig.model_validate({
        "out": str(out), "manifest": str(corpus / "manifest"), "objective": "hubert", "labels": str(corpus / "labels"),
        "encoder": {"architecture": "tiny", "num_mels": 20, **still, **(encoder or {})},
        "hubert": {"final_dim": 16, "unmasked_weight": 0.5},
        "batches": {"batch_seconds": 2.0, "crop_seconds": 0.8},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0}, "alarm": {"after_steps": 1000},
        "training": TrainingConfig(max_steps=6, log_every=1, checkpoint_every=3, validate_every=3, device="cpu", accumulate=accumulate),
    })  # fmt: skip
    pretrain(config)


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(1)
    hubert(corpus, out / "plain")
    hubert(corpus, out / "waveform", encoder={"front_end": "waveform"})
    hubert(corpus, out / "layer_drop", encoder={"layer_drop": 0.5, "num_layers": 3})
    hubert(corpus, out / "accumulated", accumulate=3)
    run_linear(out / "linear", LinearTask(num_valid=3, freeze_steps=5), clip_norm=0.5)  # phases; batches of 5 and 3
    run_linear(out / "single", LinearTask(batch=1, num_valid=1))  # a rank never has an item of its own


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
