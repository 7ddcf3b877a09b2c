"""A task's batches through fairseq2's data-reader interface: the same plan, micro-batches and position as in our engine."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from fairseq2.datasets import DataReader

from pretrain.training.engine import to_device
from pretrain.training.loading import load_ahead
from pretrain.training.parallel import World
from pretrain.training.task import Task, TrainingConfig


class MicroBatch:
    """One micro-batch of a step, taken from the loader when the trainer wants it on the device: one at a time is held."""

    def __init__(self, source: Iterator[tuple[Any, float]]):
        self._source = source
        self.content: Any = None
        self.weight = 1.0

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Load it onto `device`, in place (fairseq2's SupportsDeviceTransfer)."""
        batch, self.weight = next(self._source)
        self.content = to_device(batch, device)


class TaskReader(DataReader[MicroBatch]):  # type: ignore[misc]  # Any where fairseq2 is not installed
    """Steps of `task`: a list of this rank's micro-batches each; StopIteration at the end of every epoch, and once `ended()`.

    Its state is the position in the plan, (epoch, batch), which is the same on every rank and for any number of them, and the `seconds`
    that the run has taken, all sessions together.
    """

    def __init__(self, task: Task, training: TrainingConfig, world: World, ended: Callable[[], bool]):
        self._task, self._training, self._world, self._ended = task, training, world, ended
        self.position = 0, 0  # of the next step
        self.amount = 0.0  # of the step given last, over all ranks, in the task's unit
        self._began = time.monotonic()
        self._source: Any = None
        self._ahead: Any = None  # the first step of the next epoch, after the end of one was told

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._ended():
            raise StopIteration
        if self._source is None:
            self._source = load_ahead(self._task, self.position, self._training, self._world)
        if self._ahead is None:
            self._ahead = next(self._source)
            if self._ahead[0][0] > self.position[0] and self.position[1] > 0:
                self.position = self._ahead[0]
                raise StopIteration
        (epoch, number), parts, micro_batches, self.amount = self._ahead
        self._ahead, self.position = None, (epoch, number + 1)
        return [MicroBatch(micro_batches) for _ in range(parts)]

    def reset(self) -> None:
        """Called at the end of an epoch: the next one follows by itself."""

    def close(self) -> None:
        """End the loader's threads."""
        if self._source is not None:
            self._source.close()

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self.position[0], "batch": self.position[1], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        epoch, batch, seconds = state_dict["epoch"], state_dict["batch"], state_dict["seconds"]
        if not isinstance(epoch, int) or not isinstance(batch, int) or not isinstance(seconds, float):
            raise ValueError(
                f"not a position in a plan: epoch {epoch!r}, batch {batch!r}, after {seconds!r} seconds"
            )
        self.position = epoch, batch
        self._began = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def num_accumulate(self) -> int:
        return self._training.accumulate
