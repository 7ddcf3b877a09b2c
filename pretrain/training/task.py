"""What a training job supplies to an engine (`Task`, `Loss`), and what every run is told (`TrainingConfig`,
`OptimizerConfig`).

Two engines run tasks: ours (pretrain/training/engine.py) and fairseq2's trainer
(pretrain/fairseq2/training.py).
"""

import math
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config, Seed


class Loss(NamedTuple):
    """What a model's forward returns: `total` is summed over what `count` counts; metrics are (sum, count)
    pairs of any shape."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which a Loss has no use for
    metrics: dict[str, tuple[Tensor, Tensor]]


class Task:
    """What a training job supplies. Batches are NamedTuples whose tensors the engine moves to the device."""

    model: nn.Module
    unit: str = "s"

    def blocks(self) -> list[nn.Module]:
        """The model's repeated parts (transformer layers): what is sharded, recomputed and compiled one at a
        time.

        Each is called as a module in every forward, also where its output is not used.
        """
        return []

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Global batches of item numbers, a pure function of (seed, epoch)."""
        raise NotImplementedError

    def split(self, items: np.ndarray, parts: int) -> list[np.ndarray]:
        """One global batch into `parts` micro-batches of like size."""
        return [items[part::parts] for part in range(parts)]

    def collate(self, items: np.ndarray, epoch: int) -> Any:
        """Load a micro-batch; a pure function of its arguments, called from a background thread."""
        raise NotImplementedError

    def amount(self, items: np.ndarray) -> float:
        """How much `items` are, in `unit`, for the throughput."""
        raise NotImplementedError

    def plan_validation(self) -> list[np.ndarray]:
        return []

    def collate_validation(self, items: np.ndarray) -> Any:
        return self.collate(items, epoch=-1)

    def evaluate(self) -> dict[str, float]:
        """What else a validation tells, logged as `valid_NAME`. Called on every rank, without gradients, in
        eval mode."""
        return {}

    def before_step(self, step: int) -> None:
        """Set what depends on the step alone: temperatures, layer gates."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser's update of `step`, such as for moving averages of parameters."""

    def phase(self, step: int) -> int:
        """A number that changes where the set of trained parameters changes; `enter_phase` then sets
        requires_grad."""
        return 0

    def enter_phase(self, phase: int) -> None: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW. `lr_scale` multiplies the learning rate. By default vectors and biases get no
        weight decay."""
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Turn reduced metrics (sum / count) into the numbers to log; override to summarise histograms."""
        return {name: float(value) for name, value in metrics.items() if value.ndim == 0}

    def alarm(self, metrics: dict[str, float], step: int) -> str | None:
        """A message that stops the run (collapse), or None: from the numbers of a log line, where there was a
        validation those of the validation among them (`valid_NAME`). NaN is the engine's business."""
        return None


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019) and its schedule.

    `linear` and `polynomial` decay to `final_lr_ratio` over the whole run after the warm-up, `cosine`
    likewise; `tri_stage` is wav2vec 2.0's fine-tuning schedule: warm-up, hold, exponential decay (shares of
    the run in `tri_stage`), to 0.05 when `final_lr_ratio` is 0; `warmup_steps` has no part in it.
    """

    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(0.0, ge=0, description="global gradient norm; 0 clips nothing")
    schedule: Literal["constant", "linear", "polynomial", "cosine", "tri_stage"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    power: float = Field(1.0, gt=0, description="of the polynomial schedule")
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    tri_stage: tuple[float, float, float] = (0.1, 0.4, 0.5)

    def factor(self, step: int, max_steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0)."""
        if self.schedule == "tri_stage":
            warm, hold = self.tri_stage[0] * max_steps, self.tri_stage[1] * max_steps
            if step < warm:
                return 0.01 + 0.99 * step / warm
            after = max(0.0, step - warm - hold) / max(1.0, self.tri_stage[2] * max_steps)
            return math.exp(min(after, 1.0) * math.log(self.final_lr_ratio or 0.05))
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = 1 - (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        shape = {
            "constant": 1.0,
            "linear": left,
            "polynomial": left**self.power,
            "cosine": (1 - math.cos(math.pi * left)) / 2,
        }
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * shape[self.schedule]


class TrainingConfig(Config):
    """Length, seed, precision and rhythm of a run."""

    max_steps: int = Field(gt=0)
    max_epochs: float | None = Field(
        None, gt=0, description="passes over the data, where that comes before max_steps"
    )
    seed: Seed = 0
    engine: Literal["wordless", "fairseq2"] = Field(
        "wordless",
        description="what steps: this toolkit's own loop, or fairseq2's trainer (extra `fairseq2`, "
        "docs/fairseq2.md)",
    )
    accumulate: int = Field(1, ge=1, description="micro-batches a rank computes for one update")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU that has it"
    )
    compile: bool = Field(
        False, description="torch.compile: each block, or the whole model where it has none"
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="several processes: whole copies of the model (DDP), or split over the ranks (FSDP2)",
    )
    activation_checkpointing: bool = Field(
        False, description="keep each block's input alone and recompute it in backward"
    )
    device: str = "auto"
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0, description="0: at the end only")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_best: bool = Field(False, description="keep the checkpoint with the best validation, too")
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "validations in a row without a better one, after which the run ends (with all parameters in "
            "training)"
        ),
    )
    loader_threads: int = Field(2, ge=1)
    collective_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="how long a rank waits for the others, their saving included, before the run ends, to go "
        "on from its last checkpoint",
    )

    @model_validator(mode="after")
    def _validates_while_it_has_patience(self) -> Self:
        if self.patience is not None and not (self.keep_best and self.validate_every):
            raise ValueError(
                "patience counts validations against the best one: set validate_every above 0 and keep_best "
                "= true"
            )
        return self


# What an unfinished run may go on with: how a step is computed, not what.
NEUTRAL = {
    "training.accumulate",
    "training.sharding",
    "training.activation_checkpointing",
    "training.compile",
    "training.device",
    "training.loader_threads",
    "batches.decoder",  # of earlier versions
    "training.keep_checkpoints",
    "training.keep_best",
    "training.collective_timeout_seconds",
}
