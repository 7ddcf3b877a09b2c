"""What test_distributed runs, once in a process alone and once in two: every scenario, one after another.

python -m torch.distributed.run --nproc_per_node 2 tests/pretrain/distributed_worker.py CORPUS OUT
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.objectives.hubert import HubertTask
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from pretrain.training.task import TrainingConfig
from tests.pretrain.linear_task import LinearTask, run_linear
from tests.pretrain.stopping_worker import once_at, one_session

STILL = {"input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
DROPPING: dict[str, Any] = {"layer_drop": 0.5, "num_layers": 3}
NOISY: dict[str, Any] = {**DROPPING, "input_dropout": 0.1, "dropout": 0.1, "attention_dropout": 0.1}


def hubert(corpus: Path, out: Path, encoder: dict[str, Any] | None = None, **training: Any) -> None:
    """Batches of about three utterances, one of them of a single one; validation is one batch, so one rank
    has none."""
    settings = {
        "max_steps": 6,
        "log_every": 1,
        "checkpoint_every": 3,
        "validate_every": 3,
        "device": "cpu",
        **training,
    }
    config = PretrainConfig.model_validate(
        {
            "out": str(out),
            "manifest": str(corpus / "aligned"),
            "objective": "hubert",
            "labels": str(corpus / "labels"),
            "encoder": {"architecture": "tiny", "num_mels": 20, **STILL, **(encoder or {})},
            "hubert": {"final_dim": 16, "unmasked_weight": 0.5},
            "batches": {"batch_seconds": 2.0, "crop_seconds": 0.8},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
            "alarm": {"after_steps": 1000},
            "evaluation": {"layer": 1, "num_classes": 3},
            "training": TrainingConfig(**settings),
        }
    )
    pretrain(config)


@contextmanager
def before_each_step(call: Callable[[int], None]) -> Iterator[None]:
    """HuBERT runs call `call(step)` before a step."""
    before_step = HubertTask.before_step

    def both(task: HubertTask, step: int) -> None:
        before_step(task, step)
        call(step)

    HubertTask.before_step = both  # type: ignore[method-assign]
    try:
        yield
    finally:
        HubertTask.before_step = before_step  # type: ignore[method-assign]


def cut(corpus: Path, out: Path, **training: Any) -> None:
    """The run `noisy` up to a power cut in step 6 of 8; its last checkpoint is of step 4."""

    def fail(step: int) -> None:
        if step == 6:
            raise RuntimeError("power cut")

    with before_each_step(fail):
        try:
            noisy(corpus, out, **training)
        except RuntimeError as error:
            if str(error) != "power cut":
                raise
        else:
            raise AssertionError("the run was not cut")
    gc.collect()


def stopped(corpus: Path, out: Path, **training: Any) -> None:
    """The run `noisy`, twice stopped by a signal to one rank: after step 3, in the middle between
    checkpoints, and after step 7."""
    for step, rank in ((1, 1), (5, 0)):
        with before_each_step(once_at(step, rank=rank)):
            one_session(lambda: noisy(corpus, out, **training))
    noisy(corpus, out, **training)


def noisy(corpus: Path, out: Path, **training: Any) -> None:
    hubert(corpus, out, NOISY, max_steps=8, checkpoint_every=4, validate_every=4, **training)


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(1)
    hubert(corpus, out / "plain")
    hubert(corpus, out / "waveform", {"front_end": "waveform"})
    hubert(corpus, out / "layer_drop", DROPPING, max_steps=24, checkpoint_every=12)
    hubert(corpus, out / "accumulated", accumulate=3)
    # phases; batches of 5 and 3
    run_linear(out / "linear", LinearTask(num_valid=3, freeze_steps=5), clip_norm=0.5)
    run_linear(out / "single", LinearTask(batch=1, num_valid=1))  # a rank never has an item of its own
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    for name, how in {"none": {}, "full": {"sharding": "full"}}.items():
        noisy(corpus, out / f"noisy_{name}", **how)
        stopped(corpus, out / f"stopped_{name}", **how)
        for later, then in {"none": {}, "full": {"sharding": "full"}}.items():
            cut(corpus, out / f"{name}_then_{later}", **how)
            noisy(corpus, out / f"{name}_then_{later}", **then)
    full = {"sharding": "full"}
    hubert(corpus, out / "sharded_layer_drop", DROPPING, max_steps=24, checkpoint_every=12, **full)
    hubert(corpus, out / "sharded_accumulated", accumulate=3, **full)
    noisy(corpus, out / "recomputed", activation_checkpointing=True)
    noisy(corpus, out / "sharded_recomputed", activation_checkpointing=True, **full)
    run_linear(out / "sharded_linear", LinearTask(num_valid=3, freeze_steps=5), full, clip_norm=0.5)
    run_linear(out / "sharded_single", LinearTask(batch=1, num_valid=1), full)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
