"""The only training loop: pretraining, CTC and the unit language model run through `train`.

A `Task` supplies the model, the batches and, through the model's forward, a `Loss` (sum, count, metrics). The engine divides
the gradient once by the count over all ranks and accumulation steps, so any split of a global batch gives the same update.
Several processes (RANK, LOCAL_RANK, WORLD_SIZE, from torchrun or slurm/) use DistributedDataParallel. Randomness is a
function of (seed, epoch, rank, step), so resuming from a checkpoint continues bit for bit.
"""

import gc
import itertools
import json
import math
import os
import time
import tomllib
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tomli_w
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.artefact import atomic_path, commit, require_absent, write_json
from pretrain.checkpoint import latest_checkpoint, load_checkpoint, remove_old_checkpoints, save_checkpoint
from pretrain.config import Config, differences, without_none
from pretrain.progress import progress


class Loss(NamedTuple):
    """What a model's forward returns: `total` is summed over what `count` counts; metrics are (sum, count) pairs of any shape."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which a Loss has no use for
    metrics: dict[str, tuple[Tensor, Tensor]]


class Task:
    """What a training job supplies. Batches are NamedTuples whose tensors the engine moves to the device."""

    model: nn.Module
    unit: str = "s"

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
        """A message that stops the run (collapse), or None. NaN is the engine's business."""
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
    compile: bool = False
    device: str = "auto"
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0, description="0: at the end only")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    loader_threads: int = Field(2, ge=1)


_groups_joined = itertools.count()


class World(NamedTuple):
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        """Read RANK, LOCAL_RANK and WORLD_SIZE and, with more than one process, join the group (nccl on GPUs, else gloo)."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
            torch.cuda.set_device(chosen)
        if size > 1 and not dist.is_initialized():
            # Under a name of its own: the launcher's store still holds the addresses of a group this process left before.
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]  # public, but its stub exports it not
            store = dist.PrefixStore(f"run{next(_groups_joined)}", store)  # type: ignore[attr-defined]
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        return cls(rank, size, chosen)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self) -> None:
        """Wait for the others and leave the group: a process that exits with one open may abort after its work is done.

        No DistributedDataParallel may be in use any more. One that holds the group's last reference would end it while holding the
        interpreter's lock, which gloo's threads may be waiting for: the process would hang.
        """
        if self.size > 1:
            dist.barrier()
            gc.collect()
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


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
) -> dict[str, Any]:
    """Train to `max_steps` or `max_epochs`, from the newest checkpoint in `out` if there is one; returns the run's summary.

    Errors: ValueError when `out` is finished, was begun with other settings, or the run diverges or collapses (the last good
    checkpoint stays and is named).
    """
    run, extra = Path(out), extra or {}
    require_absent(run)
    world = World.join(training.device)
    main = world.rank == 0
    max_steps = training.max_steps
    if training.max_epochs is not None:
        max_steps = max(1, min(max_steps, round(training.max_epochs * len(task.plan(0)))))
    _write_or_compare_config(run, config, write=main)
    task.model.to(world.device)
    adamw = torch.optim.AdamW(
        task.parameter_groups(),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    world.barrier()
    checkpoint = latest_checkpoint(run)
    state: dict[str, Any] = (
        load_checkpoint(checkpoint, task.model, adamw) if checkpoint else {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0}
    )
    start, began = state["step"], time.monotonic() - state["seconds"]
    log = _Log(run, start) if main else None
    window = _Window()
    phase: int | None = None
    model: nn.Module = task.model
    done_before = start

    def save(step: int, position: tuple[int, int]) -> None:
        if main:
            stored = {"epoch": position[0], "batch": position[1], "seconds": time.monotonic() - began}
            save_checkpoint(run, step, task.model, adamw, {**stored, "kind": kind, "extra": extra, "config": config})
            remove_old_checkpoints(run, training.keep_checkpoints)
        world.barrier()

    batches = _batches(task, (state["epoch"], state["batch"]), training, world)
    with progress(f"train {run.name}", max_steps, "step", done=start) if main else nullcontext(lambda *_, **__: None) as advance:
        for step in range(start, max_steps):
            if phase != task.phase(step):
                phase = task.phase(step)
                task.enter_phase(phase)
                model = _wrap(task.model, world, training.compile)
            position, micro_batches, amount = next(batches)
            task.before_step(step)
            torch.manual_seed(_mix(training.seed, step, world.rank))
            task.model.train()
            count = torch.zeros((), device=world.device)
            for number, (batch, weight) in enumerate(micro_batches):
                with _no_sync(model, number < len(micro_batches) - 1), _autocast(training.precision, world.device):
                    loss = _weighted(model(_move(batch, world.device)), weight)
                loss.total.backward()
                count += loss.count
                window.add(loss)
            world.sum(count)
            norm = _scale_and_clip(task.model, world.size / count.clamp(min=1e-8), optimizer.clip_norm)
            window.add_norm(norm)
            for group in adamw.param_groups:
                group["lr"] = optimizer.lr * group.get("lr_scale", 1.0) * optimizer.factor(step, max_steps)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            window.amount += amount
            step_done, last = step + 1, step + 1 == max_steps
            save_due = last or step_done % training.checkpoint_every == 0
            metrics: dict[str, float] = {}
            if save_due or step_done % training.log_every == 0:
                metrics = task.describe(window.reduce(world))
                metrics |= {"lr": adamw.param_groups[0]["lr"], f"{task.unit}_per_second": window.rate()}
                _stop_if_broken(task, metrics, step_done, run)
                window = _Window()
            if last or (training.validate_every and step_done % training.validate_every == 0):
                valid = _validate(task, world, training)
                metrics |= {f"valid_{name}": value for name, value in valid.items()}
            if metrics and log is not None:
                log.write(step_done, metrics)
            advance(1, note=f"loss {metrics['loss']:.3f}" if "loss" in metrics else None)
            if save_due:
                save(step_done, (position[0], position[1] + 1))
    batches.close()
    summary: dict[str, Any] = {}
    if main:
        assert log is not None
        summary = log.summarise(max_steps, time.monotonic() - began, max_steps - done_before)
        log.close()
        write_json(run / "summary.json", summary)
        last_checkpoint = f"step_{max_steps:08d}/model.safetensors"
        commit(run, kind, config, parents, [last_checkpoint], **extra)
    model = task.model  # lets go of the wrapper
    world.leave()
    return summary


def _batches(
    task: Task, position: tuple[int, int], training: TrainingConfig, world: World
) -> Generator[tuple[tuple[int, int], list[tuple[Any, float]], float], None, None]:
    """(epoch, batch) and this rank's micro-batches from `position` on, for ever, loaded ahead by threads in a fixed order."""

    def order() -> Generator[tuple[tuple[int, int], list[tuple[np.ndarray, float]], float], None, None]:
        epoch, first = position
        while True:
            plan = task.plan(epoch)
            if not plan:
                raise ValueError("the training data hold no batch: the manifest's split is empty or every utterance was left out")
            for number in range(first, len(plan)):
                parts = task.split(plan[number], world.size * training.accumulate)[world.rank :: world.size]
                # Every rank runs the same number of forwards; one left without items repeats an item with weight 0.
                weighted = [(part, 1.0) if len(part) else (plan[number][:1], 0.0) for part in parts]
                yield (epoch, number), weighted, task.amount(plan[number])
            epoch, first = epoch + 1, 0

    pool = ThreadPoolExecutor(training.loader_threads)
    queue: list[tuple[tuple[int, int], list[tuple[Future[Any], float]], float]] = []
    try:
        for place, parts, amount in order():
            queue.append((place, [(pool.submit(task.collate, items, place[0]), weight) for items, weight in parts], amount))
            if len(queue) > training.loader_threads + 1:
                ready = queue.pop(0)
                yield ready[0], [(future.result(), weight) for future, weight in ready[1]], ready[2]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def _validate(task: Task, world: World, training: TrainingConfig) -> dict[str, float]:
    task.model.eval()
    window = _Window()
    torch.manual_seed(_mix(training.seed, -1, 0))
    plan = task.plan_validation()
    if not plan:
        return {}
    # As in training, a rank without a batch of its own repeats one with weight 0, so that all ranks reduce the same sums.
    for items, weight in [(items, 1.0) for items in plan[world.rank :: world.size]] or [(plan[0], 0.0)]:
        with _autocast(training.precision, world.device):
            window.add(_weighted(task.model(_move(task.collate_validation(items), world.device)), weight))
    return {name: value for name, value in task.describe(window.reduce(world)).items() if name != "gradient_norm"}


class _Window:
    """Sums of metrics since the last log line, on the device: nothing here waits for it until `reduce`."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.amount = 0.0
        self.began = time.monotonic()

    def add(self, loss: Loss) -> None:
        for name, (total, count) in {"loss": (loss.total, loss.count), **loss.metrics}.items():
            pair = [total.detach().double(), torch.as_tensor(count, device=total.device).detach().double()]
            self.sums[name] = [a + b for a, b in zip(self.sums[name], pair, strict=True)] if name in self.sums else pair

    def add_norm(self, norm: Tensor) -> None:
        pair = [norm.double(), torch.ones_like(norm).double()]
        self.sums["gradient_norm"] = [
            a + b for a, b in zip(self.sums.get("gradient_norm", [norm.new_zeros(()).double()] * 2), pair, strict=True)
        ]

    def reduce(self, world: World) -> dict[str, Tensor]:
        return {
            name: (world.sum(total) / world.sum(count).clamp(min=1e-12)).cpu() for name, (total, count) in sorted(self.sums.items())
        }

    def rate(self) -> float:
        return self.amount / max(time.monotonic() - self.began, 1e-9)


class _Log:
    """`metrics.jsonl` and TensorBoard events. Lines after the step that training resumes from are dropped."""

    def __init__(self, run: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter  # half a second that only training needs

        self.path = run / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file():
            self.lines = [line for line in map(_parse_line, self.path.read_text().splitlines()) if line and line["step"] <= start]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(self.path, "a")  # noqa: SIM115  # closed by close()
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = {"step": step, **metrics}
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def summarise(self, steps: int, seconds: float, steps_now: int) -> dict[str, Any]:
        losses = [line["loss"] for line in self.lines if "loss" in line]
        summary = {
            "steps": steps,
            "seconds": seconds,
            "steps_this_time": steps_now,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
        summary |= {name: value for name, value in self.lines[-1].items() if name not in ("step", "loss", "lr")}
        return summary

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:  # the last line of a killed run
        return None
    return line


def _stop_if_broken(task: Task, metrics: dict[str, float], step: int, run: Path) -> None:
    broken = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics.get(name, 0.0))]
    reason = f"{' and '.join(broken)} not finite" if broken else task.alarm(metrics, step)
    if reason:
        kept = latest_checkpoint(run)
        remedy = "try a lower optimizer.lr, a longer warmup_steps or optimizer.clip_norm" if broken else ""
        raise ValueError(f"{run}: stopped at step {step}: {reason}. {remedy} The last good checkpoint: {kept or 'none yet'}")


def _scale_and_clip(model: nn.Module, scale: Tensor, clip_norm: float) -> Tensor:
    """Multiply all gradients by `scale`, then clip their global norm; returns the norm before clipping. No host sync."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) * scale
    if clip_norm > 0:
        scale = scale * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm.detach()


def _wrap(model: nn.Module, world: World, compiled: bool) -> nn.Module:
    wrapped: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]  # torch types it as a callable
    if world.size > 1 and any(p.requires_grad for p in model.parameters()):
        wrapped = DistributedDataParallel(wrapped, device_ids=[world.device] if world.device.type == "cuda" else None)
    return wrapped


def _no_sync(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def _weighted(loss: Loss, weight: float) -> Loss:
    if weight == 1.0:
        return loss
    metrics = {name: (total * weight, count * weight) for name, (total, count) in loss.metrics.items()}
    return Loss(loss.total * weight, loss.count * weight, metrics)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _move(batch: Any, device: torch.device) -> Any:
    return type(batch)(*[x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch])


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def _write_or_compare_config(run: Path, config: dict[str, Any], write: bool) -> None:
    """Check that unfinished work in `run` was begun with the same settings, on every rank; one of them writes `config.toml`."""
    text = tomli_w.dumps(without_none(config))
    path = run / "config.toml"
    if path.is_file() and latest_checkpoint(run) is not None and path.read_text() != text:
        changes = differences(tomllib.loads(path.read_text()), tomllib.loads(text))
        changed = "; ".join(f"{key}: {old!r}, now {new!r}" for key, old, new in changes)
        raise ValueError(f"{run}: holds unfinished work begun with other settings ({changed}); restore them or remove the folder")
    if write:
        with atomic_path(path) as temporary:
            temporary.write_text(text)
