"""What an engine computes: the gradients of a global batch, and a validation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.training.parallel import World, gathered, without_reduction
from pretrain.training.runlog import Window
from pretrain.training.stopping import Stop
from pretrain.training.task import Loss, Task, TrainingConfig


def backward(
    model: nn.Module,
    micro_batches: Iterator[tuple[Any, float]],
    parts: int,
    window: Window,
    precision: str,
    world: World,
) -> Tensor:
    """Adds up the gradients of this rank's `parts` of a global batch; returns the count of all ranks' losses,
    to divide by."""
    model.train()
    count = torch.zeros((), device=world.device)
    for number, (batch, weight) in enumerate(micro_batches):
        with without_reduction(model, number < parts - 1):
            with autocast(precision, world.device):
                loss = weighted(model(to_device(batch, world.device)), weight)
            loss.total.backward()
        count += loss.count
        window.add(loss)
    return world.sum(count)


@torch.no_grad()
def validate(task: Task, world: World, training: TrainingConfig, stop: Stop) -> dict[str, float] | None:
    """The metrics of a validation, without `valid_`; None if a stop came between two of its batches."""
    task.model.eval()
    window = Window()
    torch.manual_seed(mix_seed(training.seed, -1, 0))
    plan = task.plan_validation()
    if not plan:
        return {}
    # As in training, every rank runs the same number of forwards: one without a batch of its own repeats one
    # with weight 0.
    share = [(items, 1.0) for items in plan[world.rank :: world.size]]
    share += [(plan[0], 0.0)] * (-(-len(plan) // world.size) - len(share))
    with gathered(task.model), autocast(training.precision, world.device):
        for items, weight in share:
            if stop.check():
                return None
            batch = to_device(task.collate_validation(items), world.device)
            window.add(weighted(task.model(batch), weight))
        more = task.evaluate()
    stop.check(wait=True)  # a signal during `evaluate` need not wait for the next step
    return {**task.describe(window.reduce(world)), **more}


def weighted(loss: Loss, weight: float) -> Loss:
    """The loss of a micro-batch that counts `weight` times: 1, or 0 if it only keeps a rank busy."""
    if weight == 1.0:
        return loss
    metrics = {name: (total * weight, count * weight) for name, (total, count) in loss.metrics.items()}
    return Loss(loss.total * weight, loss.count * weight, metrics)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context of a forward: `TrainingConfig.precision` on this device."""
    dtype = autocast_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32, of large products."""
    if precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_bfloat16 else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, a NamedTuple, with its tensors on `device`."""
    return type(batch)(*[x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch])


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)
