"""Both engines on the same tasks: milliseconds a step under `training.engine = "wordless"` and `"fairseq2"`,
and peak memory.

A round is a whole run of a verb (`pretrain`, `finetune`, `train-lm`) of `--steps` steps in a folder of its
own, the two engines in turn. What counts are the steps after the first ten, from the end of one update to the
end of the last: loading, forward, backward, exchange, clipping, AdamW and the log lines between them, without
what begins and ends a run, which is in `run_seconds`. The task `idle` has one weight and no data: what its
steps take is the trainer. With `--processes 2` the ranks are processes of this machine (gloo, or nccl where
there are GPUs), which share the threads and the same global batches. Weights, batches and random numbers are
the same in both engines, and so should be `loss`, that of the last log line.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import corpus
from benchmarks.command import argument_parser, run_main
from benchmarks.engine_tasks import SKIPPED, Clock, IdleTask
from benchmarks.measure import Child, Contender, Measurement, load_before, machine, sides, take_turns
from pretrain.fairseq2.available import require_fairseq2
from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.task import OptimizerConfig, TrainingConfig

MODULE = "benchmarks.engine"
TASKS = ("hubert", "wav2vec2", "ctc", "lm", "idle")
ENGINES = ("wordless", "fairseq2")
NUM_CLASSES = 100
LOG_EVERY = 10  # the default; fairseq2 wants the checkpoint to fall on a log line, or writes more of these
PORTS = "BENCHMARK_PORTS"


class Ranks:
    """A rank of a task under one engine. Rank 0 starts the others, tells them to begin and waits for them."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        self.engine, self.task, processes = name.split("-")
        if self.engine == "fairseq2":
            require_fairseq2("benchmarks.engine")
        self.settings, self.folder, self.size = settings, folder, int(processes)
        self.threads = max(1, settings["threads"] // self.size)
        torch.set_num_threads(self.threads)
        self.rank = int(os.environ.get("RANK", "0"))
        self.others: list[Child] = []
        if self.size > 1 and self.rank == 0:
            ports = json.dumps(free_ports(settings["warmup"] + settings["rounds"]))
            ranks = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.size),
                    "MASTER_ADDR": "127.0.0.1",
                    PORTS: ports,
                }
                for rank in range(self.size)
            ]
            self.others = [
                Child(MODULE, name, folder, sys.executable, self.threads, given) for given in ranks[1:]
            ]
            os.environ.update(ranks[0])
        self.amount = float(settings["steps"] - SKIPPED)
        self.seconds, self.parts = 0.0, dict[str, float]()

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, number: int) -> None:
        self.out = self.folder / "runs" / f"{self.engine}-{self.task}-{self.size}-{number}"
        if self.size > 1:
            os.environ["MASTER_PORT"] = str(json.loads(os.environ[PORTS])[number])
        for other in self.others:
            other.begin(number)

    def run(self) -> None:
        began = time.perf_counter()
        clock = Clock(self.settings["steps"], self.settings["device"])
        hook = register_optimizer_step_post_hook(clock)
        try:
            run_task(self.task, self.tree(), self.folder)
        finally:
            hook.remove()
        answers = [other.answer() for other in self.others]
        self.seconds = clock.seconds
        if self.rank:
            return
        log = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        self.parts = {
            "run_seconds": time.perf_counter() - began,
            "loss": log[-1]["loss"],
            "largest_rank_gb": max([answer["peak_gb"] for answer in answers], default=0.0),
        }
        shutil.rmtree(self.out)

    def tree(self) -> dict[str, Any]:
        """Keys that every task has."""
        settings = self.settings
        training = {
            "max_steps": settings["steps"],
            "checkpoint_every": settings["steps"],
            "log_every": LOG_EVERY,
            "engine": self.engine,
            "device": settings["device"],
            "precision": settings["precision"],
            "loader_threads": self.threads,
            "seed": settings["seed"],
            "sharding": settings["sharding"],
        }
        return {"out": str(self.out), "training": training}


def run_task(name: str, tree: dict[str, Any], folder: Path) -> None:
    """One run of a verb, by the keys of its config, on what `write_inputs` wrote."""
    settings = json.loads((folder / "settings.json").read_text())
    if name == "idle":
        training = TrainingConfig.model_validate(tree["training"])
        train(
            Run(
                IdleTask(),
                out=tree["out"],
                kind="idle",
                training=training,
                optimizer=OptimizerConfig(),
                config=tree,
                parents={},
            )
        )
    elif name == "lm":
        from units.lm.training import TrainLMConfig, train_lm

        train_lm(
            TrainLMConfig.model_validate(
                {**tree, "corpus": str(folder / "units"), "split": "", "valid_split": ""}
            )
        )
    elif name == "ctc":
        from pretrain.ctc.finetune_config import FinetuneConfig
        from pretrain.ctc.finetuning import finetune

        more: dict[str, Any] = {
            "manifest": str(folder / "spoken"),
            "split": "",
            "valid_split": "",
            "encoder": str(folder / "encoder"),
            "ctc": {"freeze_steps": 0},
            "batches": {"batch_seconds": settings["batch_seconds"], "crop_seconds": 20.0},
        }
        finetune(FinetuneConfig.model_validate({**tree, **more}))
    else:
        from pretrain.objectives.pretraining import PretrainConfig, pretrain

        more = {
            "manifest": str(folder / "manifest"),
            "split": "",
            "valid_split": "",
            "objective": name,
            "encoder": {"architecture": settings["architecture"]},
            "labels": str(folder / "labels") if name == "hubert" else None,
            "alarm": {"after_steps": settings["steps"] + 1},
            "batches": {"batch_seconds": settings["batch_seconds"], "crop_seconds": 20.0},
            "optimizer": {"lr": 1e-4, "clip_norm": 1.0},
        }
        pretrain(PretrainConfig.model_validate({**tree, **more}))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, for the ranks to meet at: one a round."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def write_inputs(folder: Path, settings: dict[str, Any], tasks: list[str]) -> np.ndarray:
    """The drawn corpus with labels; for `ctc` with texts and an encoder that has had one step, for `lm`
    packed. Returns lengths."""
    from pretrain.data.manifest import write_manifest

    lengths = corpus.draw_lengths("mixed", 10.0, settings["total_seconds"], settings["seed"])
    corpus.write_corpus(folder, lengths, NUM_CLASSES, settings["seed"])
    rng = np.random.default_rng([settings["seed"], 5])
    rows = [
        {
            "id": f"u{number:05d}",
            "path": str(folder / f"u{number:05d}.wav"),
            "start": 0,
            "num_samples": length,
            "sample_rate": 16000,
            "text": " ".join("".join(rng.choice(list("etaoinshr"), 4)) for _ in range(1 + length // 8000)),
        }
        for number, length in enumerate(lengths.tolist())
    ]
    write_manifest(folder / "spoken", rows, {}, {})
    with contextlib.redirect_stdout(sys.stderr):
        if "ctc" in tasks:
            tree = {
                "out": str(folder / "encoder"),
                "training": {"max_steps": 1, "device": settings["device"]},
            }
            run_task("hubert", tree, folder)
        if "lm" in tasks:
            from units.packing import pack
            from units.packing_config import PackConfig

            given = {
                "manifest": str(folder / "manifest"),
                "labels": str(folder / "labels"),
                "out": str(folder / "units"),
            }
            pack(PackConfig.model_validate(given))
    return lengths


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """ENGINE-TASK-PROCESSES."""
    return Ranks(name, settings, folder)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """For every task and number of processes the engines in turn."""
    load = load_before()
    given = (
        "threads rounds warmup seed steps architecture batch_seconds total_seconds device precision "
        "sharding".split()
    )
    settings = {name: getattr(arguments, name) for name in given}
    if settings["steps"] <= SKIPPED or settings["steps"] % LOG_EVERY:
        raise ValueError(
            f"--steps {settings['steps']}: the first {SKIPPED} do not count, and a log line closes every "
            f"{LOG_EVERY}; give a multiple above"
        )
    if min(settings["batch_seconds"], settings["total_seconds"]) <= 0 or min(arguments.processes) < 1:
        raise ValueError(
            "--batch-seconds and --total-seconds: more than 0 s is needed, and --processes of at least 1"
        )
    engines = ENGINES if arguments.peer == "fairseq2" else ENGINES[:1]
    found = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        (folder / "settings.json").write_text(json.dumps(settings))
        lengths = write_inputs(folder, settings, arguments.tasks)
        turns = {key: settings[key] for key in ("rounds", "warmup", "threads")}
        for size in arguments.processes:
            for task in arguments.tasks:
                names = {engine: f"{engine}-{task}-{size}" for engine in engines}
                measured = take_turns(MODULE, dict.fromkeys(names.values(), sys.executable), folder, **turns)
                found[f"{task} {size}"] = figures(
                    measured[names["wordless"]], measured.get(names.get("fairseq2", ""))
                )
    first = next(iter(found.values()))
    return {
        "name": f"engine {arguments.architecture} {arguments.precision} {arguments.device}",
        "unit": "steps per second",
        **first,
        "tasks": found,
        "peer_name": None if arguments.peer == "none" else arguments.peer,
        "settings": settings,
        "load_before": load,
        "corpus": corpus.describe(lengths),
        "machine": {**machine(), "torch": torch.__version__},
        "date": date.today().isoformat(),
    }


def figures(ours: Measurement, peer: Measurement | None) -> dict[str, Any]:
    """DESIGN.md's keys, and in milliseconds what people ask for. Memory is that of the largest rank."""
    found = sides(largest(ours), peer and largest(peer))
    for name, side in (("ours", ours), ("peer", peer)):
        found |= {
            f"{name}_ms_per_step": side and 1000 / side.rate,
            f"{name}_loss": side and side.parts["loss"],
        }
        found[f"{name}_run_seconds"] = side and side.parts["run_seconds"]
    return found


def largest(one: Measurement) -> Measurement:
    """With the peak memory of whichever rank had most."""
    return Measurement(one.rates, max(one.peak_gb, one.parts["largest_rank_gb"]), one.hello, one.parts)


def show(result: dict[str, Any]) -> str:
    """A line for each task and number of processes."""
    lines = [
        f"{'':10}{'processes':>10}{'wordless':>13}{'fairseq2':>13}{'ratio':>8}{'peak memory, GB':>20}   ms a "
        "step; last loss"
    ]
    for name, found in result["tasks"].items():
        task, size = name.split()
        peer, ratio, memory = ("-", "-", f"{found['ours_peak_gb']:.2f}")
        loss = f"{found['ours_loss']:.6g}"
        if found["peer"]:
            peer, ratio = f"{found['peer_ms_per_step']:.2f}", f"{found['ratio']:.2f}"
            memory, loss = f"{memory} / {found['peer_peak_gb']:.2f}", f"{loss} / {found['peer_loss']:.6g}"
        lines.append(
            f"{task:10}{size:>10}{found['ours_ms_per_step']:13.2f}{peer:>13}{ratio:>8}{memory:>20}   {loss}"
        )
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["fairseq2"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60, help=f"of a run; the first {SKIPPED} do not count")
    parser.add_argument(
        "--architecture",
        choices=["tiny", "small", "base", "large"],
        default="small",
        help="of the speech encoder",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--sharding", choices=["none", "full"], default="none", help="of several processes: DDP or FSDP2"
    )
    parser.add_argument("--batch-seconds", type=float, default=20.0, help="audio in a global batch")
    parser.add_argument("--total-seconds", type=float, default=600.0, help="audio in the drawn corpus")
    return run_main(MODULE, parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
