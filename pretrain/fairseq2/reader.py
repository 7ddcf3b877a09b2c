"""A task's batches through fairseq2's data-reader interface: the same plan, micro-batches and position as in
our engine."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from fairseq2.datasets import DataReader

from pretrain.training.loading import load_ahead
from pretrain.training.run import Run
from pretrain.training.step import to_device


class MicroBatch:
    """One micro-batch of a step, taken from the loader when the trainer wants it on the device: one at a time
    is held."""

    def __init__(self, source: Iterator[tuple[Any, float]]):
        self._source = source
        self.content: Any = None
        self.weight = 1.0

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Load it onto `device`, in place (fairseq2's SupportsDeviceTransfer)."""
        batch, self.weight = next(self._source)
        self.content = to_device(batch, device)


class TaskReader(DataReader[MicroBatch]):  # type: ignore[misc]  # Any where fairseq2 is not installed
    """Steps of `run`: a list of this rank's micro-batches each; StopIteration at the end of every epoch, and
    once `ended()`.

    Its state is the position in the plan, (epoch, batch), which is the same on every rank and for any number
    of them, and the `seconds` that the run has taken, all sessions together.
    """

    def __init__(self, run: Run, ended: Callable[[], bool]):
        self._run, self._ended = run, ended
        run.position, run.began = (0, 0), time.monotonic()
        self.amount = 0.0  # of the step given last, over all ranks, in the task's unit
        self._source: Any = None
        self._ahead: Any = None  # the first step of the next epoch, after the end of one was told

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._ended():
            raise StopIteration
        run = self._run
        if self._source is None:
            self._source = load_ahead(run.task, run.position, run.training, run.world)
        if self._ahead is None:
            self._ahead = next(self._source)
            if self._ahead[0][0] > run.position[0] and run.position[1] > 0:
                run.position = self._ahead[0]
                raise StopIteration
        (epoch, number), parts, micro_batches, self.amount = self._ahead
        self._ahead, run.position = None, (epoch, number + 1)
        return [MicroBatch(micro_batches) for _ in range(parts)]

    def reset(self) -> None:
        """Called at the end of an epoch: the next one follows by itself."""

    def close(self) -> None:
        """End the loader's threads."""
        if self._source is not None:
            self._source.close()

    def state_dict(self) -> dict[str, object]:
        epoch, batch = self._run.position
        return {"epoch": epoch, "batch": batch, "seconds": self._run.seconds}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        epoch, batch, seconds = state_dict["epoch"], state_dict["batch"], state_dict["seconds"]
        if not isinstance(epoch, int) or not isinstance(batch, int) or not isinstance(seconds, float):
            raise ValueError(
                f"not a position in a plan: epoch {epoch!r}, batch {batch!r}, after {seconds!r} seconds"
            )
        self._run.position, self._run.began = (epoch, batch), time.monotonic() - seconds

    @property
    def num_accumulate(self) -> int:
        return self._run.training.accumulate
