"""Batches for the training loop: in the order of the plan, loaded ahead by threads."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pretrain.training.parallel import World

if TYPE_CHECKING:
    from pretrain.training.task import Task, TrainingConfig


def load_ahead(
    task: "Task", position: tuple[int, int], training: "TrainingConfig", world: World
) -> Generator[tuple[tuple[int, int], int, Iterator[tuple[Any, float]], float], None, None]:
    """(epoch, batch), how many micro-batches this rank has of it, those, and the global amount; from `position` on, for ever.

    Threads load a few micro-batches ahead, in a fixed order, however many make up a step.
    """

    def order() -> Generator[tuple[tuple[int, int], list[tuple[np.ndarray, float]], float], None, None]:
        epoch, first = position
        while True:
            plan = task.plan(epoch)
            if not plan:
                raise ValueError(
                    "the training data hold no batch: the manifest's split is empty or every utterance was left out"
                )
            for number in range(first, len(plan)):
                parts = task.split(plan[number], world.size * training.accumulate)[world.rank :: world.size]
                # Every rank runs the same number of forwards; one left without items repeats an item with weight 0.
                weighted = [
                    (part, 1.0) if len(part) else (plan[number][:1], 0.0)
                    for part in parts
                    if len(part) or world.size > 1
                ]
                yield (epoch, number), weighted, task.amount(plan[number])
            epoch, first = epoch + 1, 0

    def load(items: np.ndarray, epoch: int) -> Any:
        batch = task.collate(items, epoch)
        if world.device.type != "cuda":
            return batch
        return type(batch)(
            *[x.pin_memory() if isinstance(x, Tensor) else x for x in batch]
        )  # copied without waiting

    def jobs() -> Generator[tuple[np.ndarray, int, float], None, None]:
        for place, parts, amount in order():
            steps.append((place, len(parts), amount))
            yield from ((items, place[0], weight) for items, weight in parts)

    def submit_ahead() -> None:
        while len(pending) < training.loader_threads + 2:
            items, epoch, weight = next(source)
            pending.append((pool.submit(load, items, epoch), weight))

    def take(count: int) -> Generator[tuple[Any, float], None, None]:
        for _ in range(count):
            submit_ahead()
            future, weight = pending.popleft()
            yield future.result(), weight

    pool = ThreadPoolExecutor(training.loader_threads)
    steps: deque[tuple[tuple[int, int], int, float]] = deque()
    pending: deque[tuple[Future[Any], float]] = deque()
    source = jobs()
    try:
        while True:
            submit_ahead()
            place, count, amount = steps.popleft()
            yield place, count, take(count), amount
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
