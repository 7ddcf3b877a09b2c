"""The smallest job that uses all of the engine: a regression with dropout, two phases and a validation
set."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.training import checkpoint
from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.task import Loss, OptimizerConfig, Task, TrainingConfig


class Pairs(NamedTuple):
    x: Tensor  # (batch, 4)
    y: Tensor  # (batch,)
    note: str  # what is not a tensor passes through


class Regression(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.body, self.head, self.dropout = nn.Linear(4, 6), nn.Linear(6, 1), dropout

    def forward(self, batch: Pairs) -> Loss:
        hidden = F.dropout(torch.tanh(self.body(batch.x)), self.dropout, self.training)
        error = self.head(hidden)[:, 0] - batch.y
        count = torch.tensor(float(len(error)), device=error.device)
        histogram = torch.bincount((error.detach() > 0).long(), minlength=2).float()
        metrics = {"absolute_error": (error.detach().abs().sum(), count), "_histogram": (histogram, count)}
        return Loss(error.square().sum(), count, metrics)


class LinearTask(Task):
    """23 items in batches of 5, so the last batch of an epoch has 3. `on_step` is called before every
    step."""

    unit = "item"

    def __init__(
        self,
        dropout: float = 0.0,
        batch: int = 5,
        num_valid: int = 0,
        freeze_steps: int = 0,
        nan_from: int | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ):
        torch.manual_seed(0)
        self.model = Regression(dropout)
        self.batch, self.num_valid, self.freeze_steps, self.nan_from, self.on_step = (
            batch,
            num_valid,
            freeze_steps,
            nan_from,
            on_step,
        )
        self.phases: list[int] = []
        self.served: list[tuple[int, list[int]]] = []

    def blocks(self) -> list[nn.Module]:
        return [self.model.body]

    def plan(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([7, epoch]).permutation(23)
        return [order[start : start + self.batch] for start in range(0, 23, self.batch)]

    def plan_validation(self) -> list[np.ndarray]:
        return [np.array([100 + number, 200 + number]) for number in range(self.num_valid)]

    def collate(self, items: np.ndarray, epoch: int) -> Pairs:
        self.served.append((epoch, items.tolist()))
        x = np.stack([np.random.default_rng([item, epoch + 1]).standard_normal(4) for item in items.tolist()])
        y = x @ [1.0, -2.0, 0.5, 0.0]
        if self.nan_from is not None and epoch >= self.nan_from:
            y[:] = np.nan
        return Pairs(torch.from_numpy(x).float(), torch.from_numpy(y).float(), f"epoch {epoch}")

    def amount(self, items: np.ndarray) -> float:
        return float(len(items))

    def before_step(self, step: int) -> None:
        self.on_step(step)

    def phase(self, step: int) -> int:
        return int(step >= self.freeze_steps)

    def enter_phase(self, phase: int) -> None:
        self.phases.append(phase)
        self.model.body.requires_grad_(phase == 1)

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        return {**super().describe(metrics), "share_positive": float(metrics["_histogram"][1])}


class ScoredTask(LinearTask):
    """Its validations after steps 2, 4, 6, … say what they are told to, as `valid_score`; validation losses
    are its own."""

    def __init__(self, scores: Sequence[float], **options: Any):
        super().__init__(num_valid=1, **options)
        self.scores, self.step = scores, 0

    def before_step(self, step: int) -> None:
        self.step = step + 1
        super().before_step(step)

    def evaluate(self) -> dict[str, float]:
        return {"score": self.scores[self.step // 2 - 1]}


def run_linear(
    out: Path,
    task: LinearTask | None = None,
    training: dict[str, Any] | None = None,
    monitor: Sequence[str] = ("valid_loss",),
    **optimizer: Any,
) -> dict[str, Any]:
    settings = TrainingConfig(
        **{"max_steps": 12, "log_every": 2, "checkpoint_every": 4, "device": "cpu", **(training or {})}
    )
    adamw = OptimizerConfig(**{"lr": 0.05, "schedule": "cosine", "warmup_steps": 2, **optimizer})
    config = {"training": settings.resolved(), "optimizer": adamw.resolved(), "nothing": None}
    parents, extra = {"data": "0"}, {"objective": "regression"}
    return train(
        Run(
            task or LinearTask(),
            out=str(out),
            kind="test",
            training=settings,
            optimizer=adamw,
            config=config,
            parents=parents,
            extra=extra,
            monitor=monitor,
        )
    )


def kill_while_saving(number: int) -> None:
    """From now on the process kills itself inside its `number`-th save, between the weights and the
    optimiser's state."""
    calls, write = [0], checkpoint.save_file

    def write_or_die(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 * number:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    checkpoint.save_file = write_or_die  # type: ignore[assignment]


if __name__ == "__main__":  # test_engine runs this file and watches it die
    import sys

    kill_while_saving(2)
    run_linear(Path(sys.argv[1]), LinearTask(dropout=0.3))
