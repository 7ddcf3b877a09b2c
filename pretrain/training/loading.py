"""Batches for the training loop: in the order of the plan, loaded ahead by threads."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from pretrain.training.parallel import World
from pretrain.training.task import Task, TrainingConfig

Place = tuple[int, int]  # epoch, and the number of a batch in its plan


def load_ahead(
    task: Task, position: Place, training: TrainingConfig, world: World
) -> Generator[tuple[Place, int, Iterator[tuple[Any, float]], float], None, None]:
    """From `position` on, for ever: (epoch, batch), the number of this rank's micro-batches, those, and the
    global amount.

    Threads load a few micro-batches ahead, in a fixed order, whatever their number in a step.
    """

    def load(items: np.ndarray, epoch: int) -> Any:
        batch = task.collate(items, epoch)
        if world.device.type != "cuda":
            return batch
        # copied without waiting
        return type(batch)(*[x.pin_memory() if isinstance(x, Tensor) else x for x in batch])

    def jobs() -> Generator[tuple[np.ndarray, int, float], None, None]:
        for place, parts, amount in _order(task, position, world, training.accumulate):
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
    steps: deque[tuple[Place, int, float]] = deque()
    pending: deque[tuple[Future[Any], float]] = deque()
    source = jobs()
    try:
        while True:
            submit_ahead()
            place, count, amount = steps.popleft()
            yield place, count, take(count), amount
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _order(
    task: Task, position: Place, world: World, accumulate: int
) -> Generator[tuple[Place, list[tuple[np.ndarray, float]], float], None, None]:
    """The plan from `position` on: each batch's place, this rank's items and weights of its micro-batches,
    and its amount.

    Every rank runs the same number of forwards: one without items repeats an item with weight 0.
    """
    epoch, first = position
    while True:
        plan = task.plan(epoch)
        if not plan:
            raise ValueError(
                "the training data hold no batch: the manifest's split is empty or every utterance was left "
                "out"
            )
        for number in range(first, len(plan)):
            items = plan[number]
            parts = task.split(items, world.size * accumulate)[world.rank :: world.size]
            kept = [part for part in parts if len(part) or world.size > 1]
            weighted = [(part, 1.0) if len(part) else (items[:1], 0.0) for part in kept]
            yield (epoch, number), weighted, task.amount(items)
        epoch, first = epoch + 1, 0
