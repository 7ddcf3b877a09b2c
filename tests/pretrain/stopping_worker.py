"""Runs that are stopped by signals, in one process or several, until they are finished or may go no further.

python -m torch.distributed.run --nproc_per_node 2 tests/pretrain/stopping_worker.py SCENARIOS OUT
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrain.training import stopping
from tests.pretrain.linear_task import LinearTask, Pairs, ScoredTask, run_linear

RANK = int(os.environ.get("RANK", "0"))
FULL: dict[str, Any] = {"sharding": "full"}
SCORES = [5.0, 4.0, 3.0, 4.0, 4.0, 4.0]  # of steps 2, 4, … 12
MONITOR = ("valid_score",)
PATIENT = {
    "keep_best": True,
    "validate_every": 2,
    "patience": 2,
    "checkpoint_every": 5,
    "keep_checkpoints": 1,
}  # to step 10


def stop_self(number: int = signal.SIGUSR2) -> None:
    os.kill(os.getpid(), number)


def once_at(*steps: int, rank: int = 0, number: int = signal.SIGUSR2) -> Callable[[int], None]:
    """An `on_step` that signals this process before each of `steps`, once, if it is that rank."""
    left = set(steps)

    def on_step(step: int) -> None:
        if step in left and rank == RANK:
            left.remove(step)
            stop_self(number)

    return on_step


def until_finished(run: Callable[[], dict[str, Any]], most: int = 20) -> tuple[dict[str, Any], int]:
    """`run` again for as long as it is stopped; its summary and how often it was. Signals reach a handler
    that lets it return."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        for stops in range(most):
            try:
                summary = run()
                stopping._unanswered = 0  # a signal that came too late is not for the next run here
                return summary, stops
            except SystemExit as stop:
                if stop.code != 128 + signal.SIGUSR2:
                    raise
                gc.collect()
    finally:
        signal.signal(signal.SIGUSR2, before)
    raise AssertionError(f"stopped {most} times")


def random_stops(seed: int, max_steps: int, count: int, rank: int = 0) -> Callable[[int], None]:
    steps = np.random.default_rng(seed).choice(max_steps, count, replace=False)
    return once_at(*map(int, steps), rank=rank)


class Validated(ScoredTask):
    """Three batches to validate on. Before those with numbers in `at` (counted over the whole task) it
    signals itself."""

    def __init__(
        self, scores: list[float], at: Collection[int] = (), in_evaluate: Collection[int] = (), **options: Any
    ):
        super().__init__(scores, **options)
        self.num_valid, self.at, self.in_evaluate, self.validated, self.evaluated = 3, at, in_evaluate, 0, 0

    def collate_validation(self, items: np.ndarray) -> Pairs:
        if self.validated in self.at:
            stop_self()
        self.validated += 1
        return super().collate_validation(items)

    def evaluate(self) -> dict[str, float]:
        if self.evaluated in self.in_evaluate:
            stop_self()
        self.evaluated += 1
        return super().evaluate()


class Recorded(LinearTask):
    """Writes the items of each step that is really computed, a line per micro-batch, to `ids`."""

    def __init__(self, ids: Path, **options: Any):
        super().__init__(**options)
        self.step = -1
        ids.parent.mkdir(parents=True, exist_ok=True)

        def note(model: nn.Module, inputs: tuple[Pairs]) -> None:
            if model.training:
                with open(ids, "a") as file:
                    file.write(json.dumps({"step": self.step, "items": json.loads(inputs[0].note)}) + "\n")

        self.model.register_forward_pre_hook(note)

    def collate(self, items: np.ndarray, epoch: int) -> Pairs:
        return super().collate(items, epoch)._replace(note=json.dumps([epoch, items.tolist()]))

    def before_step(self, step: int) -> None:
        self.step = step
        super().before_step(step)


def elastic(
    out: Path, name: str, accumulate: int = 1, on_step: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """24 steps; those of session `name` are recorded in OUT.ids/."""
    task = Recorded(out.with_suffix(".ids") / f"{name}_{RANK}.jsonl", num_valid=3, on_step=on_step)
    settings = {
        "max_steps": 24,
        "log_every": 1,
        "checkpoint_every": 8,
        "validate_every": 8,
        "accumulate": accumulate,
    }
    return run_linear(out, task, settings, clip_norm=0.5)


def broken_off(out: Path, at: set[int], rank: int = 0, **settings: Any) -> Callable[[], dict[str, Any]]:
    """A session of a run that is signalled before the validation batches with numbers in `at`, counted over
    all sessions."""
    validated = 0

    def run() -> dict[str, Any]:
        nonlocal validated
        task = Validated(SCORES, at if rank == RANK else (), dropout=0.3)
        task.validated = validated
        try:
            return run_linear(out, task, settings, MONITOR)
        finally:
            validated = task.validated

    return run


def one_session(run: Callable[[], Any]) -> None:
    """`run` until it is stopped, which it must be."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        run()
    except SystemExit:
        gc.collect()
    else:
        raise AssertionError("was not stopped")
    finally:
        signal.signal(signal.SIGUSR2, before)


def afresh(out: Path, phases: dict[str, Any], settings: dict[str, Any]) -> None:
    """A session of a run, with a task of its own."""
    run_linear(out, LinearTask(**phases), settings)


def everything(out: Path) -> None:
    """Straight and stopped runs, whole copies and sharded; the first session of the elastic one."""
    for rank, (how, settings) in enumerate({"none": {}, "full": FULL}.items()):
        phases: dict[str, Any] = {"dropout": 0.3, "freeze_steps": 9, "num_valid": 2}
        longer = {"max_steps": 24, "log_every": 5, **settings}
        run_linear(out / f"straight_{how}", LinearTask(**phases), longer)
        on_step = random_stops(rank, 22, 3, 1 - rank)  # one rank alone gets the signal
        until_finished(partial(afresh, out / f"stopped_{how}", {"on_step": on_step, **phases}, longer))
        patient = {**PATIENT, **settings}
        run_linear(out / f"patient_{how}", Validated(SCORES, dropout=0.3), patient, MONITOR)
        # Of three batches rank 0 has the first and the last, rank 1 has the second and repeats one.
        until_finished(broken_off(out / f"broken_off_{how}", {2, 6, 9}, rank, **patient))
    one_session(lambda: elastic(out / "elastic", "a", on_step=once_at(9, rank=1)))


def slow(out: Path, **training: Any) -> None:
    """A hundred steps of 50 ms, for signals from outside."""
    task = LinearTask(dropout=0.3, on_step=lambda step: time.sleep(0.05))
    run_linear(out, task, {"max_steps": 100, "checkpoint_every": 50, **training})


def lose(out: Path, how: str, when: str) -> None:
    """Rank 1 stops answering, or dies, between joining and the first step or in step 6. The others wait two
    seconds for an answer, and not at all for the dead."""

    def lost() -> None:
        if RANK == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)

    class Losing(LinearTask):
        def parameter_groups(self) -> list[dict[str, Any]]:
            if when == "before":
                lost()
            return super().parameter_groups()

    task = Losing(on_step=lambda step: lost() if (when, step) == ("within", 6) else None)
    run_linear(out, task, {"collective_timeout_seconds": 2.0 if how == "hangs" else 600.0})


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    {
        "everything": lambda: everything(folder),
        "elastic": lambda: elastic(folder / "elastic", "c"),
        "slow": lambda: slow(folder),
        "slow_full": lambda: slow(folder, sharding="full"),
        "lose": lambda: lose(folder, *sys.argv[3:]),
    }[scenario]()
