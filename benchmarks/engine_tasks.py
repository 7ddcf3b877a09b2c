"""What the benchmark engine adds to a run: a task that does nothing, and a clock of the steps."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.training.task import Loss, Task

SKIPPED = 10  # the first steps of a run, which do not count


class Nothing(NamedTuple):
    """A batch of the idle task."""

    x: Tensor


class Weight(nn.Module):
    """One weight, and a loss that is never nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch: Nothing) -> Loss:
        error = (self.weight - batch.x).square().sum()
        return Loss(error, torch.ones((), device=error.device), {})


class IdleTask(Task):
    """Steps in which nothing is done."""

    unit = "item"

    def __init__(self) -> None:
        self.model = Weight()

    def plan(self, epoch: int) -> list[np.ndarray]:
        return [np.arange(2 * number, 2 * number + 2) for number in range(1000)]

    def collate(self, items: np.ndarray, epoch: int) -> Nothing:
        return Nothing(torch.zeros(1))

    def amount(self, items: np.ndarray) -> float:
        return float(len(items))


class Clock:
    """The time of the updates `SKIPPED` and `last` of a run, by a hook of torch's on every optimizer's
    step."""

    def __init__(self, last: int, device: str):
        self.last, self.device, self.done = last, device, 0
        self.times: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done in (SKIPPED, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        first, last = self.times
        return last - first
