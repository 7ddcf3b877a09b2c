"""Training tasks whose items are utterances."""

import heapq

import numpy as np

from pretrain.data.batches import SpeechBatches
from pretrain.training.task import Task


class SpeechTask(Task):
    """A training task on the utterances of `train_set`, validated on `valid_set` if there is one."""

    train_set: SpeechBatches
    valid_set: SpeechBatches | None

    def plan(self, epoch: int) -> list[np.ndarray]:
        return self.train_set.plan(epoch)

    def split(self, items: np.ndarray, parts: int) -> list[np.ndarray]:
        """Micro-batches of like total length: the longest utterance first, each to the shortest part.

        Each part keeps the batch's order.
        """
        lengths = self.train_set.lengths[items]
        place = np.empty(len(items), np.int64)
        totals = [(0, part) for part in range(parts)]
        for longest in np.argsort(-lengths, kind="stable").tolist():
            total, part = totals[0]
            place[longest] = part
            heapq.heapreplace(totals, (total + int(lengths[longest]), part))
        return [items[place == part] for part in range(parts)]

    def plan_validation(self) -> list[np.ndarray]:
        return self.valid_set.plan_in_order() if self.valid_set else []

    def amount(self, items: np.ndarray) -> float:
        return self.train_set.seconds(items)
