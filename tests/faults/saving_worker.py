"""What test_checkpoint_kills runs: sessions of one training run, each in a fork that is killed inside a save,
until the run is finished.

python tests/faults/saving_worker.py kills FOLDER SEED KILLS   a run killed so often, and an undisturbed one
beside it python tests/faults/saving_worker.py steps FOLDER              one save, killed before each of its
calls that change the disk

Nothing is computed before the forks, so that no thread is lost in them. Prints JSON lines for the test to
judge.
"""

import hashlib
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto import event_pb2  # noqa: F401  # here, so that no fork pays for it
from torch.utils.tensorboard import summary  # noqa: F401

from pretrain.training import checkpoint
from pretrain.training import run as run_module
from tests.pretrain.linear_task import LinearTask, Pairs, run_linear

MAX_STEPS, INTERVAL = 200, 2


class TracedTask(LinearTask):
    """Writes down what each step is made of: the items of its batch, and the generator's state when its
    dropout is drawn."""

    def __init__(self, trace: Path):
        super().__init__(dropout=0.3, num_valid=2)
        self.model.register_buffer("ballast", torch.zeros(2**17))  # so that a save takes a while
        self.trace, self.step, forward = trace, 0, self.model.forward

        def traced(batch: Pairs) -> Any:
            if self.model.training:
                generator = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
                with open(self.trace, "a") as file:
                    file.write(json.dumps([self.step, batch.note, generator]) + "\n")
            return forward(batch)

        self.model.forward = traced

    def collate(self, items: Any, epoch: int) -> Pairs:
        return super().collate(items, epoch)._replace(note=f"{epoch}: {items.tolist()}")

    def before_step(self, step: int) -> None:
        self.step = step


def session(run: Path, keep: int, told: int | None = None) -> None:
    """Train to the end; `told` is a pipe that hears of the beginning of every save (b"s") and of its end
    (b"e")."""
    torch.set_num_threads(1)
    save = run_module.save_checkpoint

    def telling(*arguments: Any, **named: Any) -> Path:
        if told is not None:
            os.write(told, b"s")
        path = save(*arguments, **named)
        if told is not None:
            os.write(told, b"e")
        return path

    run_module.save_checkpoint = telling
    task = TracedTask(run.with_suffix(".trace"))
    training = {
        "max_steps": MAX_STEPS,
        "checkpoint_every": INTERVAL,
        "validate_every": 10,
        "keep_checkpoints": keep,
    }
    run_linear(run, task, training)


def fork(body: Callable[[], None]) -> int:
    if (child := os.fork()) == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(folder: Path, seed: int, number: int) -> None:
    rng = random.Random(seed)
    durations: list[float] = []
    told, tell = os.pipe()
    child, began = fork(partial(session, folder / "whole", 2, tell)), 0.0
    while len(durations) < MAX_STEPS // INTERVAL:
        if os.read(told, 1) == b"s":
            began = time.monotonic()
        else:
            durations.append(time.monotonic() - began)
    assert end_of(child) == 0
    usual = sorted(durations)[len(durations) // 2]
    print(json.dumps({"save_seconds": usual}), flush=True)
    run, done = folder / "killed", 0
    while done < number:
        told, tell = os.pipe()
        child = fork(partial(session, run, rng.choice([1, 2]), tell))
        os.close(tell)
        saves, wanted = 0, rng.randint(1, 3)
        while saves < wanted and (heard := os.read(told, 1)):
            saves += heard == b"s"
        time.sleep(rng.uniform(0, 1.1 * usual))
        os.kill(child, signal.SIGKILL)
        status = end_of(child)
        assert status in (0, -signal.SIGKILL), status
        while select.select([told], [], [], 0)[0] and (heard := os.read(told, 1)):
            saves += heard == b"s"
        os.close(told)
        if status == 0:
            break
        done += 1
        newest = checkpoint.latest_checkpoint(run)
        left = {
            path.name.rpartition(".")[0][1:].split(".")[0]: sorted(os.listdir(path))
            for path in run.glob(".step_*.tmp")
        }
        steps = [json.loads(line)[0] for line in run.with_suffix(".trace").read_text().splitlines()]
        print(
            json.dumps(
                {"saves": saves, "newest": newest and newest.name, "left": left, "step": steps[-1] + 1}
            ),
            flush=True,
        )
    if not (run / "meta.json").is_file():
        assert end_of(fork(partial(session, run, 2))) == 0


def steps(folder: Path) -> None:
    """A second save of step 4 where there is none, a valid one (saved again because the run was told to
    stop), a damaged one."""

    def save(run: Path, step: int, seconds: float, keep: int = 1) -> None:
        torch.manual_seed(step)
        model = torch.nn.Linear(3, 3)
        adamw = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        adamw.step()
        checkpoint.save_checkpoint(run, step, model, adamw, {"seconds": seconds})
        checkpoint.remove_old_checkpoints(run, keep, None, step)

    def killed_at(call: int) -> None:
        left = iter(range(call))

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return wrapped

        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.save_file = counted(checkpoint.save_file)

    for case in ("absent", "valid", "damaged"):
        for call in itertools.count():
            run = folder / f"{case}{call}"

            def first(run: Path = run, case: str = case) -> None:
                save(run, 2, 1.0)
                if case != "absent":
                    save(run, 4, 1.0, keep=2 if case == "damaged" else 1)
                if case == "damaged":
                    os.truncate(run / "step_00000004" / "model.safetensors", 50)

            def second(run: Path = run, call: int = call) -> None:
                killed_at(call)
                save(run, 4, 2.0)

            assert end_of(fork(first)) == 0
            status = end_of(fork(second))
            newest = checkpoint.latest_checkpoint(run)
            seconds = newest and json.loads((newest / "state.json").read_text())["seconds"]
            assert end_of(fork(partial(save, run, 6, 3.0))) == 0
            row = {"case": case, "status": status, "newest": newest and newest.name, "seconds": seconds}
            print(json.dumps({**row, "then": sorted(os.listdir(run))}), flush=True)
            if status == 0:
                break


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        kills(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        steps(Path(sys.argv[2]))
