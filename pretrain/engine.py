"""The only training loop: pretraining, CTC and the unit language model run through `train`.

A `Task` supplies the model, the batches and, through the model's forward, a `Loss` (sum, count, metrics). The engine divides
the gradient once by the count over all ranks and accumulation steps, so any split of a global batch gives the same update.
Several processes (RANK, LOCAL_RANK, WORLD_SIZE, from torchrun or slurm/) use DistributedDataParallel or FSDP2
(pretrain/parallel.py). Randomness is a function of (seed, epoch, rank, step), so resuming from a checkpoint continues bit for
bit. A run may go on with another number of processes, `accumulate` or `sharding`: it stays the same up to rounding, and up to
what is drawn by rank (dropout). SIGTERM and SIGUSR2 stop it between two steps or within a validation (pretrain/stopping.py),
with a checkpoint from which it becomes what it would have been, its log included.
"""

import math
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import tomli_w
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.artefact import atomic_path, commit, require_absent, write_json
from pretrain.checkpoint import (
    Best,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from pretrain.config import Config, differences, without_none
from pretrain.kernels import keep_freed_memory
from pretrain.loading import load_ahead
from pretrain.parallel import (
    World,
    compile_in_place,
    gathered,
    recompute_in_backward,
    replicate,
    scale_and_clip,
    shard,
    without_reduction,
)
from pretrain.progress import progress
from pretrain.runlog import RunLog, Window
from pretrain.stopping import Stop, lost_ranks_told


class Loss(NamedTuple):
    """What a model's forward returns: `total` is summed over what `count` counts; metrics are (sum, count) pairs of any shape."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which a Loss has no use for
    metrics: dict[str, tuple[Tensor, Tensor]]


class Task:
    """What a training job supplies. Batches are NamedTuples whose tensors the engine moves to the device."""

    model: nn.Module
    unit: str = "s"

    def blocks(self) -> list[nn.Module]:
        """The model's repeated parts (transformer layers): what is sharded, recomputed and compiled one at a time.

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
        """What else a validation tells, logged as `valid_NAME`. Called on every rank, without gradients, in eval mode."""
        return {}

    def before_step(self, step: int) -> None:
        """Set what depends on the step alone: temperatures, layer gates."""

    def phase(self, step: int) -> int:
        """A number that changes where the set of trained parameters changes; `enter_phase` then sets requires_grad."""
        return 0

    def enter_phase(self, phase: int) -> None: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW. `lr_scale` multiplies the learning rate. By default vectors and biases get no weight decay."""
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def describe(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Turn reduced metrics (sum / count) into the numbers to log; override to summarise histograms."""
        return {name: float(value) for name, value in metrics.items() if value.ndim == 0}

    def alarm(self, metrics: dict[str, float], step: int) -> str | None:
        """A message that stops the run (collapse), or None: from the numbers of a log line, where there was a validation those
        of the validation among them (`valid_NAME`). NaN is the engine's business."""
        return None


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019) and its schedule.

    `linear` and `polynomial` decay to `final_lr_ratio` over the whole run after the warm-up, `cosine` likewise; `tri_stage` is
    wav2vec 2.0's fine-tuning schedule: warm-up, hold, exponential decay (shares of the run in `tri_stage`), to 0.05 when
    `final_lr_ratio` is 0; `warmup_steps` has no part in it.
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
        shape = {"constant": 1.0, "linear": left, "polynomial": left**self.power, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * shape[self.schedule]


class TrainingConfig(Config):
    """Length, seed, precision and rhythm of a run."""

    max_steps: int = Field(gt=0)
    max_epochs: float | None = Field(None, gt=0, description="passes over the data, where that comes before max_steps")
    seed: int = 0
    accumulate: int = Field(1, ge=1, description="micro-batches a rank computes for one update")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 autocast on a GPU that has it")
    compile: bool = Field(False, description="torch.compile: each block, or the whole model where it has none")
    sharding: Literal["none", "full"] = Field(
        "none", description="several processes: whole copies of the model (DDP), or split over the ranks (FSDP2)"
    )
    activation_checkpointing: bool = Field(False, description="keep each block's input alone and recompute it in backward")
    device: str = "auto"
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0, description="0: at the end only")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_best: bool = Field(False, description="keep the checkpoint with the best validation, too")
    patience: int | None = Field(
        None,
        ge=1,
        description="validations in a row without a better one, after which the run ends (with all parameters in training)",
    )
    loader_threads: int = Field(2, ge=1)
    collective_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="how long a rank waits for the others, their saving included, before the run ends, to go on from its last checkpoint",
    )

    @model_validator(mode="after")
    def _validates_while_it_has_patience(self) -> Self:
        if self.patience is not None and not (self.keep_best and self.validate_every):
            raise ValueError("patience counts validations against the best one: set validate_every above 0 and keep_best = true")
        return self


# What an unfinished run may go on with: how a step is computed, not what.
NEUTRAL = {
    "training.accumulate", "training.sharding", "training.activation_checkpointing", "training.compile", "training.device",
    "training.loader_threads", "training.keep_checkpoints", "training.keep_best", "training.collective_timeout_seconds",
}  # fmt: skip


def train(
    task: Task,
    *,
    out: str,
    kind: str,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    config: dict[str, Any],
    parents: dict[str, str],
    extra: dict[str, Any] | None = None,
    monitor: Sequence[str] = ("valid_loss",),
) -> dict[str, Any]:
    """Train to `max_steps` or `max_epochs`, from the newest checkpoint in `out` if there is one; returns the run's summary.

    `monitor` are the metrics that `keep_best` and `patience` go by (see Best); validations before the last phase, while a part of
    the model is still frozen, do not try the patience.

    A signal that stops the run (SIGTERM, SIGUSR2) is passed on once a checkpoint is written, and ends the process; one that comes
    when only the end is left to be written lets that happen.

    Errors: ValueError when `out` is finished, was begun with other settings, has `patience` and nothing to validate on, or the run
    diverges or collapses (the last good checkpoint stays and is named); ConnectionError when another rank is lost.
    """
    run, extra = Path(out), extra or {}
    require_absent(run)
    world = World.join(training.device, training.collective_timeout_seconds)
    if world.device.type == "cpu":
        keep_freed_memory()
    main = world.rank == 0
    max_steps = training.max_steps
    if training.max_epochs is not None:
        max_steps = max(1, min(max_steps, round(training.max_epochs * len(task.plan(0)))))
    if training.patience is not None and not task.plan_validation():
        raise ValueError(f"{run}: training.patience needs a validation set, and there is none; name one or leave the key out")
    with lost_ranks_told(run, world):
        checkpoint = _checkpoint_to_resume(run, config, world)
        _place(task, training, world)
        adamw = torch.optim.AdamW(
            task.parameter_groups(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        state: dict[str, Any] = (
            load_checkpoint(checkpoint, task.model, adamw) if checkpoint else {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0}
        )
        start, began = state["step"], time.monotonic() - state["seconds"]
        # A stop left the look at the last step, with its validation, undone: it comes first, and any line it wrote is written again.
        unseen: bool = state.get("unseen", False)
        log = RunLog(run, start - unseen) if main else None
        window = Window.from_state(state.get("window", {}), world)
        phase: int | None = None
        model: nn.Module = task.model
        done = saved = start
        position = state["epoch"], state["batch"]  # of the next batch
        best = Best(monitor)
        if training.keep_best:
            best.resume(run, state, world)

        def save() -> None:
            nonlocal saved
            stored = {"epoch": position[0], "batch": position[1], "seconds": time.monotonic() - began}
            stored |= best.to_state() if training.keep_best else {}
            if part := window.to_state(world):
                stored |= {"window": part, "unseen": unseen}
            save_checkpoint(run, done, task.model, adamw, {**stored, "kind": kind, "extra": extra, "config": config}, write=main)
            if main:
                remove_old_checkpoints(run, training.keep_checkpoints, best.step, done)
            world.barrier()
            saved = done

        def require_sound(reason: str | None) -> None:
            if reason:
                kept = checkpoint_path(run, saved) if saved else "none yet"
                raise ValueError(f"{run}: stopped at step {done}: {reason.removesuffix('.')}. The last good checkpoint: {kept}")

        def out_of_patience() -> bool:
            return training.patience is not None and best.stale >= training.patience

        batches = load_ahead(task, position, training, world)
        bar = progress(f"train {run.name}", max_steps, "step", done=start) if main else nullcontext(lambda *_, **__: None)
        with Stop(world, training.collective_timeout_seconds) as stop, bar as advance:
            stop.check(wait=True)
            for step in range(start - unseen, max_steps):
                if stop.signal or out_of_patience():
                    break
                if phase != task.phase(step):
                    phase = task.phase(step)
                    task.enter_phase(phase)
                    model = replicate(task.model, world)
                task.before_step(step)
                for group in adamw.param_groups:
                    group["lr"] = optimizer.lr * group.get("lr_scale", 1.0) * optimizer.factor(step, max_steps)
                if step >= start:
                    (epoch, batch_number), parts, micro_batches, amount = next(batches)
                    torch.manual_seed(_mix(training.seed, step, world.rank))
                    count = _backward(model, micro_batches, parts, window, training, world)
                    norm = scale_and_clip(task.model, world.size / count.clamp(min=1e-8), optimizer.clip_norm)
                    window.add_norm(norm, step + 1)
                    adamw.step()
                    adamw.zero_grad(set_to_none=True)
                    window.amount += amount
                    done, position = step + 1, (epoch, batch_number + 1)
                    advance(1)
                    stop.check()
                save_due = done == max_steps or done % training.checkpoint_every == 0
                validate_due = done == max_steps or bool(training.validate_every and done % training.validate_every == 0)
                if save_due or validate_due or done % training.log_every == 0:
                    rate = window.rate()
                    judgement = _validate(task, world, training, stop) if validate_due else {}
                    unseen = judgement is None
                    if judgement is None:
                        break
                    metrics = task.describe(window.reduce(world))
                    metrics |= {"lr": adamw.param_groups[0]["lr"], f"{task.unit}_per_second": rate}
                    metrics |= {f"valid_{name}": value for name, value in judgement.items()}
                    if training.keep_best and monitor[0] in metrics:
                        judged = world.from_first([metrics[name] for name in monitor])
                        better = best.judge(done, judged, counts=task.phase(step) == task.phase(max_steps - 1))
                        save_due |= better or best.stale == training.patience
                    require_sound(_not_finite(metrics, window, training, optimizer) or task.alarm(metrics, done))
                    window = Window()
                    if log is not None:
                        log.write(done, metrics)
                    advance(0, note=f"loss {metrics['loss']:.3f}")
                if save_due:
                    save()
            batches.close()
            finished = not unseen and (done == max_steps or out_of_patience())
            if not finished and saved < done:
                if window.sums:
                    require_sound(_not_finite(task.describe(window.reduce(world)), window, training, optimizer))
                save()
            summary: dict[str, Any] = {}
            if log is not None:
                if finished:
                    summary = log.summarise(done, time.monotonic() - began, done - start)
                    if best.step is not None:
                        summary |= {"best_step": best.step, **best.summary}
                    if training.patience is not None:
                        summary["stopped_early"] = done < max_steps
                    write_json(run / "summary.json", summary)
                    kept = {done, done if best.step is None else best.step}
                    commit(run, kind, config, parents, [f"step_{step:08d}/model.safetensors" for step in sorted(kept)], **extra)
                log.close()
        model = task.model  # lets go of the wrapper
        world.leave()
    if not finished:
        stop.pass_on(run, done)
    return summary


def _checkpoint_to_resume(run: Path, config: dict[str, Any], world: World) -> Path | None:
    """The newest checkpoint that is whole, None where there is none; and `_write_or_compare_config`.

    The first rank alone reads and decides. The others are told, so that all go on from the same step, or none does.
    """
    name, refusal = None, None
    if world.rank == 0:
        try:
            found = latest_checkpoint(run)
            _write_or_compare_config(run, config, begun=found is not None)
            name = found and found.name
        except (ValueError, OSError) as error:
            refusal = error
    name, refused = world.from_first([name, refusal and str(refusal)])
    if refused is not None:
        raise refusal or ValueError(refused)
    return run / name if name else None


def _backward(
    model: nn.Module, micro_batches: Iterator[tuple[Any, float]], parts: int, window: Window, training: TrainingConfig, world: World
) -> Tensor:
    """Add up the gradients of this rank's `parts` of a global batch; returns what all ranks' losses count, to divide by."""
    model.train()
    count = torch.zeros((), device=world.device)
    for number, (batch, weight) in enumerate(micro_batches):
        with without_reduction(model, number < parts - 1):
            with autocast(training.precision, world.device):
                loss = _weighted(model(to_device(batch, world.device)), weight)
            loss.total.backward()
        count += loss.count
        window.add(loss)
    return world.sum(count)


@torch.no_grad()
def _validate(task: Task, world: World, training: TrainingConfig, stop: Stop) -> dict[str, float] | None:
    """What a validation tells, without `valid_`; None when it was broken off, as a stop does between two batches."""
    task.model.eval()
    window = Window()
    torch.manual_seed(_mix(training.seed, -1, 0))
    plan = task.plan_validation()
    if not plan:
        return {}
    # As in training, every rank runs the same number of forwards: one without a batch of its own repeats one with weight 0.
    share = [(items, 1.0) for items in plan[world.rank :: world.size]]
    share += [(plan[0], 0.0)] * (-(-len(plan) // world.size) - len(share))
    with gathered(task.model), autocast(training.precision, world.device):
        for items, weight in share:
            if stop.check():
                return None
            window.add(_weighted(task.model(to_device(task.collate_validation(items), world.device)), weight))
        more = task.evaluate()
    stop.check(wait=True)  # a signal during `evaluate` need not wait for the next step
    return {**task.describe(window.reduce(world)), **more}


def _place(task: Task, training: TrainingConfig, world: World) -> None:
    """The model on its device, sharded, recomputed and compiled as `training` says."""
    blocks = task.blocks()
    if training.activation_checkpointing and not blocks:
        raise ValueError("training.activation_checkpointing: this model has no blocks to recompute; leave the key out")
    if training.compile:
        compile_in_place(task.model, blocks)
    if training.activation_checkpointing:
        recompute_in_backward(blocks)
    if training.sharding == "full" and world.size > 1:
        shard(task.model, blocks, world)
    else:
        task.model.to(world.device)


def _not_finite(metrics: dict[str, float], window: Window, training: TrainingConfig, optimizer: OptimizerConfig) -> str | None:
    """What to tell of a loss or a gradient's norm that is not finite; None where both are."""
    broken = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not broken:
        return None
    first = window.first_not_finite
    reason = f"{' and '.join(broken)} not finite{f', first in step {first}' if first else ''}. Try a lower optimizer.lr"
    reason += f" (now {optimizer.lr:g}), a longer optimizer.warmup_steps (now {optimizer.warmup_steps})"
    reason += f", a lower optimizer.clip_norm (now {optimizer.clip_norm:g}{'' if optimizer.clip_norm else ': nothing is clipped'})"
    return reason + (' or, if it ran in bfloat16, training.precision = "float32"' if training.precision != "float32" else "")


def _weighted(loss: Loss, weight: float) -> Loss:
    if weight == 1.0:
        return loss
    metrics = {name: (total * weight, count * weight) for name, (total, count) in loss.metrics.items()}
    return Loss(loss.total * weight, loss.count * weight, metrics)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context that a forward runs in: `TrainingConfig.precision` on this device."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, a NamedTuple, on `device`; what else it holds stays."""
    return type(batch)(*[x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch])


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def _write_or_compare_config(run: Path, config: dict[str, Any], begun: bool) -> None:
    """Write `config.toml`; where the work in `run` has `begun`, refuse other settings than it was begun with."""
    text = tomli_w.dumps(without_none(config))
    path = run / "config.toml"
    if begun and path.is_file() and path.read_text(encoding="utf-8") != text:
        changes = differences(tomllib.loads(path.read_text(encoding="utf-8")), tomllib.loads(text))
        changed = "; ".join(f"{key}: {old!r}, now {new!r}" for key, old, new in changes if key not in NEUTRAL)
        if changed:
            raise ValueError(
                f"{run}: holds unfinished work begun with other settings ({changed}); restore them or remove the folder"
            )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
