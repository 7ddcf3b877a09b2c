"""The patience of a run, as fairseq2's trainer asks for it."""

import fairseq2.recipe  # noqa: F401  # before fairseq2.trainer, with which it imports in a circle
from fairseq2.early_stopper import EarlyStopper

from pretrain.training.run import Run


class Patience(EarlyStopper):  # type: ignore[misc]
    """Whether `patience` validations in a row were not the best."""

    def __init__(self, run: Run):
        self._run = run

    def should_stop(self, step_nr: int, score: float) -> bool:
        return self._run.out_of_patience
