"""What test_engine runs, once in a process alone and once in two: every kind of task with both engines, and
runs that are cut, stopped, split.

python -m torch.distributed.run --nproc_per_node 2 tests/fairseq2/engine_worker.py CORPUS OUT
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.finetuning import finetune
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from tests.pretrain.distributed_worker import NOISY, cut, hubert, noisy, stopped
from tests.pretrain.linear_task import LinearTask, run_linear
from units.lm.training import TrainLMConfig, train_lm

THEIRS: dict[str, Any] = {"engine": "fairseq2"}
ENGINES = ("wordless", "fairseq2")
TASKS = ("wav2vec2", "hubert", "ctc", "lm")
STEPS = 50


def run_task(name: str, corpus: Path, out: Path, engine: str) -> None:
    """50 steps with dropout, masks, LayerDrop (speech), warm-up, clipping, a validation half way; the same
    global batches for any number of processes."""
    training = {
        "max_steps": STEPS,
        "log_every": 1,
        "validate_every": 25,
        "checkpoint_every": 25,
        "device": "cpu",
        "engine": engine,
    }
    optimizer = {"lr": 2e-3, "warmup_steps": 5, "clip_norm": 1.0}
    tree: dict[str, Any] = {
        "out": str(out / f"{name}_{engine}"),
        "training": training,
        "optimizer": optimizer,
    }
    speech = {"manifest": str(corpus / "manifest"), "batches": {"batch_seconds": 3.0, "crop_seconds": 1.0}}
    encoder = {
        "architecture": "tiny",
        "num_mels": 20,
        **(NOISY if int(os.environ.get("WORLD_SIZE", "1")) == 1 else STILL),
    }
    if name in ("wav2vec2", "hubert"):
        tree |= {**speech, "objective": name, "encoder": encoder, "alarm": {"after_steps": 1000}}
        if name == "hubert":
            tree |= {"labels": str(corpus / "labels"), "hubert": {"final_dim": 16}}
        else:
            tree["wav2vec2"] = {"num_entries": 8, "code_dim": 16, "final_dim": 16, "num_distractors": 10}
        pretrain(PretrainConfig.model_validate_json(json.dumps(tree)))
    elif name == "ctc":
        ctc = {"freeze_steps": 10, "final_dropout": 0.0, "freeze_front_end": False}
        tree |= {**speech, "encoder": str(corpus / "encoder"), "ctc": {**ctc, "mask_channel_length": 8}}
        finetune(FinetuneConfig.model_validate_json(json.dumps(tree)))
    else:
        model = {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "ffn_dim": 32,
            "context": 64,
            "dropout": 0.0,
        }
        tree |= {"corpus": str(corpus / "units"), "model": model, "batch_tokens": 500}
        train_lm(TrainLMConfig.model_validate_json(json.dumps(tree)))


# Two processes draw their dropout by rank: the same in both engines, but not what one process draws.
STILL: dict[str, Any] = {
    "input_dropout": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "layer_drop": 0.05,
}


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(1)
    for name in TASKS:
        for engine in ENGINES:
            run_task(name, corpus, out, engine)
    for name, engine in (("ours", {}), ("theirs", THEIRS)):
        hubert(corpus, out / f"accumulated_{name}", accumulate=3, **engine)
        noisy(corpus, out / f"noisy_{name}", **engine)
        run_linear(out / f"linear_{name}", LinearTask(num_valid=3, freeze_steps=5), engine, clip_norm=0.5)
        run_linear(out / f"single_{name}", LinearTask(batch=1, num_valid=1), engine)
    cut(corpus, out / "cut", **THEIRS)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    noisy(corpus, out / "cut", **THEIRS)
    stopped(corpus, out / "stopped", **THEIRS)
    full = {**THEIRS, "sharding": "full"}
    noisy(corpus, out / "sharded", **full)
    cut(corpus, out / "sharded_cut", **full)
    noisy(corpus, out / "sharded_cut", **full)
    stopped(corpus, out / "sharded_stopped", **full)
    hubert(corpus, out / "sharded_accumulated", accumulate=3, **full)
    noisy(corpus, out / "sharded_recomputed", activation_checkpointing=True, **full)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
