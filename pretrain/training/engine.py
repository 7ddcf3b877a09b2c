"""The training loop: pretraining, CTC and the unit language model run through `train`.

A `Task` supplies the model, the batches and, through the model's forward, a `Loss` (sum, count, metrics). The engine divides
the gradient once by the count over all ranks and accumulation steps, so any split of a global batch gives the same update.
Several processes (RANK, LOCAL_RANK, WORLD_SIZE, from torchrun or slurm/) use DistributedDataParallel or FSDP2
(pretrain/training/parallel.py). Randomness is a function of (seed, epoch, rank, step), so resuming from a checkpoint continues bit for
bit. A run may go on with another number of processes, `accumulate` or `sharding`: it stays the same up to rounding, and up to
what is drawn by rank (dropout). SIGTERM, SIGUSR2 and Ctrl-C stop it between two steps or within a validation (pretrain/training/stopping.py),
with a checkpoint from which it becomes what it would have been, its log included.
"""

import math
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tomli_w
import torch
from torch import Tensor, nn

from pretrain.config import differences, without_none
from pretrain.progress import progress
from pretrain.store.artefact import atomic_path, commit, require_absent, write_json
from pretrain.store.lock import locked
from pretrain.training.checkpoint import (
    Best,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from pretrain.training.loading import load_ahead
from pretrain.training.memory import keep_freed_memory
from pretrain.training.parallel import (
    World,
    compile_in_place,
    gathered,
    recompute_in_backward,
    replicate,
    scale_and_clip,
    shard,
    without_reduction,
)
from pretrain.training.runlog import RunLog, Window
from pretrain.training.stopping import Stop, lost_ranks_told
from pretrain.training.task import NEUTRAL, Loss, OptimizerConfig, Task, TrainingConfig

# By `training.engine`: the function with the arguments of `train`.
ENGINES = {
    "wordless": "pretrain.training.engine:_train",
    "fairseq2": "pretrain.fairseq2.engine:train",
}


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

    A signal that stops the run (SIGTERM, SIGUSR2, SIGINT) is passed on once a checkpoint is written, and ends the process; one that
    comes when only the end is left to be written lets that happen.

    Errors: ValueError when `out` is finished, another process trains there, it was begun with other settings, has `patience` and
    nothing to validate on, or the run diverges or collapses (the last good checkpoint stays and is named); ConnectionError when
    another rank is lost.
    """
    module, _, name = ENGINES[training.engine].partition(":")
    loop: Callable[..., dict[str, Any]] = getattr(import_module(module), name)
    with locked(out):
        return loop(
            task,
            out=out,
            kind=kind,
            training=training,
            optimizer=optimizer,
            config=config,
            parents=parents,
            extra=extra,
            monitor=monitor,
        )


def _train(
    task: Task,
    *,
    out: str,
    kind: str,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    config: dict[str, Any],
    parents: dict[str, str],
    extra: dict[str, Any] | None,
    monitor: Sequence[str],
) -> dict[str, Any]:
    """`train` by the loop of ours."""
    run, extra = Path(out), extra or {}
    require_absent(run)
    world = World.join(training.device, training.collective_timeout_seconds)
    if world.device.type == "cpu":
        keep_freed_memory()
    main = world.rank == 0
    max_steps = num_steps(task, training, run)
    with lost_ranks_told(run, world, lambda: max(run.glob("step_*"), default=None)):
        found = resume_point(run, config, world, lambda: _newest(run), "fairseq2/checkpoints/step_*")
        checkpoint = run / found if found else None
        prepare(task, training)
        if training.sharding == "full" and world.size > 1:
            shard(task.model, task.blocks(), world)
        else:
            task.model.to(world.device)
        adamw = make_optimizer(task, optimizer)
        state: dict[str, Any] = (
            load_checkpoint(checkpoint, task.model, adamw)
            if checkpoint
            else {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0}
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
            save_checkpoint(
                run,
                done,
                task.model,
                adamw,
                {**stored, "kind": kind, "extra": extra, "config": config},
                write=main,
            )
            if main:
                remove_old_checkpoints(run, training.keep_checkpoints, best.step, done)
            world.barrier()
            saved = done

        def require_sound(reason: str | None) -> None:
            if reason:
                kept = checkpoint_path(run, saved) if saved else "none yet"
                raise ValueError(
                    f"{run}: stopped at step {done}: {reason.removesuffix('.')}. The last good checkpoint: {kept}"
                )

        def out_of_patience() -> bool:
            return training.patience is not None and best.stale >= training.patience

        batches = load_ahead(task, position, training, world)
        bar = (
            progress(f"train {run.name}", max_steps, "step", done=start)
            if main
            else nullcontext(lambda *_, **__: None)
        )
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
                    group["lr"] = (
                        optimizer.lr * group.get("lr_scale", 1.0) * optimizer.factor(step, max_steps)
                    )
                if step >= start:
                    (epoch, batch_number), parts, micro_batches, amount = next(batches)
                    torch.manual_seed(mix_seed(training.seed, step, world.rank))
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
                validate_due = done == max_steps or bool(
                    training.validate_every and done % training.validate_every == 0
                )
                if save_due or validate_due or done % training.log_every == 0:
                    rate = window.rate()
                    judgement = validate(task, world, training, stop) if validate_due else {}
                    unseen = judgement is None
                    if judgement is None:
                        break
                    metrics = task.describe(window.reduce(world))
                    metrics |= {"lr": adamw.param_groups[0]["lr"], f"{task.unit}_per_second": rate}
                    metrics |= {f"valid_{name}": value for name, value in judgement.items()}
                    if training.keep_best and monitor[0] in metrics:
                        judged = world.from_first([metrics[name] for name in monitor])
                        better = best.judge(
                            done, judged, counts=task.phase(step) == task.phase(max_steps - 1)
                        )
                        save_due |= better or best.stale == training.patience
                    require_sound(
                        not_finite(metrics, window.first_not_finite, training, optimizer)
                        or task.alarm(metrics, done)
                    )
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
                    require_sound(
                        not_finite(
                            task.describe(window.reduce(world)), window.first_not_finite, training, optimizer
                        )
                    )
                save()
            summary: dict[str, Any] = {}
            if log is not None:
                if finished:
                    summary = log.summarise(done, time.monotonic() - began, done - start)
                    if training.patience is not None:
                        summary["stopped_early"] = done < max_steps
                    summary = conclude(run, summary, done, best, kind, config, parents, extra)
                log.close()
        model = task.model  # lets go of the wrapper
        world.leave()
    if not finished:
        stop.pass_on(run, done)
    return summary


def _newest(run: Path) -> str | None:
    path = latest_checkpoint(run)
    return None if path is None else path.name


Found = TypeVar("Found", str, int)


def resume_point(
    run: Path, config: dict[str, Any], world: World, find: Callable[[], Found | None], of_other_engine: str
) -> Found | None:
    """The name or number of the newest checkpoint that is whole, by `find`, None where there is none; and `write_or_compare_config`.

    `of_other_engine` is a glob of the checkpoints that the other engine would have left: such a run is begun, and not by this one.
    The first rank alone reads and decides. The others are told, so that all go on from the same step, or none does.
    """
    found: Found | None = None
    refusal: Exception | None = None
    if world.rank == 0:
        try:
            found = find()
            write_or_compare_config(run, config, begun=found is not None or any(run.glob(of_other_engine)))
        except (ValueError, OSError) as error:
            refusal = error
    found, refused = world.from_first([found, refusal and str(refusal)])
    if refused is not None:
        raise refusal or ValueError(refused)
    return found


def _backward(
    model: nn.Module,
    micro_batches: Iterator[tuple[Any, float]],
    parts: int,
    window: Window,
    training: TrainingConfig,
    world: World,
) -> Tensor:
    """Add up the gradients of this rank's `parts` of a global batch; returns what all ranks' losses count, to divide by."""
    model.train()
    count = torch.zeros((), device=world.device)
    for number, (batch, weight) in enumerate(micro_batches):
        with without_reduction(model, number < parts - 1):
            with autocast(training.precision, world.device):
                loss = weighted(model(to_device(batch, world.device)), weight)
            loss.total.backward()
        count += loss.count
        window.add(loss)
    return world.sum(count)


@torch.no_grad()
def validate(task: Task, world: World, training: TrainingConfig, stop: Stop) -> dict[str, float] | None:
    """What a validation tells, without `valid_`; None when it was broken off, as a stop does between two batches."""
    task.model.eval()
    window = Window()
    torch.manual_seed(mix_seed(training.seed, -1, 0))
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
            window.add(weighted(task.model(to_device(task.collate_validation(items), world.device)), weight))
        more = task.evaluate()
    stop.check(wait=True)  # a signal during `evaluate` need not wait for the next step
    return {**task.describe(window.reduce(world)), **more}


def prepare(task: Task, training: TrainingConfig) -> None:
    """The model recomputed and compiled as `training` says; before it is wrapped, sharded or moved."""
    blocks = task.blocks()
    if training.activation_checkpointing and not blocks:
        raise ValueError(
            "training.activation_checkpointing: this model has no blocks to recompute; leave the key out"
        )
    if training.compile:
        compile_in_place(task.model, blocks)
    if training.activation_checkpointing:
        recompute_in_backward(blocks)


def make_optimizer(task: Task, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the task's groups; those of sharded or moved models come after that."""
    return torch.optim.AdamW(
        task.parameter_groups(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def num_steps(task: Task, training: TrainingConfig, run: Path) -> int:
    """How many steps the run has: `max_steps`, or those of `max_epochs` where they are fewer."""
    if training.patience is not None and not task.plan_validation():
        raise ValueError(
            f"{run}: training.patience needs a validation set, and there is none; name one or leave the key out"
        )
    if training.max_epochs is None:
        return training.max_steps
    return max(1, min(training.max_steps, round(training.max_epochs * len(task.plan(0)))))


def conclude(
    run: Path,
    summary: dict[str, Any],
    done: int,
    best: Best,
    kind: str,
    config: dict[str, Any],
    parents: dict[str, str],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Write the summary of a run that ends after step `done` and make the run complete; one rank's work."""
    if best.step is not None:
        summary |= {"best_step": best.step, **best.summary}
    write_json(run / "summary.json", summary)
    kept = {done, done if best.step is None else best.step}
    commit(
        run, kind, config, parents, [f"step_{step:08d}/model.safetensors" for step in sorted(kept)], **extra
    )
    return summary


def not_finite(
    metrics: dict[str, float], first: int | None, training: TrainingConfig, optimizer: OptimizerConfig
) -> str | None:
    """What to tell of a loss or a gradient's norm that is not finite, from step `first` if that is known; None where both are."""
    broken = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not broken:
        return None
    reason = f"{' and '.join(broken)} not finite{f', first in step {first}' if first else ''}. Try a lower optimizer.lr"
    reason += f" (now {optimizer.lr:g}), a longer optimizer.warmup_steps (now {optimizer.warmup_steps})"
    reason += f", a lower optimizer.clip_norm (now {optimizer.clip_norm:g}{'' if optimizer.clip_norm else ': nothing is clipped'})"
    return reason + (
        ' or, if it ran in bfloat16, training.precision = "float32"'
        if training.precision != "float32"
        else ""
    )


def weighted(loss: Loss, weight: float) -> Loss:
    """The loss of a micro-batch that counts `weight` times: 1, or 0 where it only keeps a rank busy."""
    if weight == 1.0:
        return loss
    metrics = {name: (total * weight, count * weight) for name, (total, count) in loss.metrics.items()}
    return Loss(loss.total * weight, loss.count * weight, metrics)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context that a forward runs in: `TrainingConfig.precision` on this device."""
    dtype = autocast_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32: what large products are computed in."""
    if precision == "auto":
        precision = (
            "bfloat16"
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else "float32"
        )
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, a NamedTuple, on `device`; what else it holds stays."""
    return type(batch)(*[x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch])


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def write_or_compare_config(run: Path, config: dict[str, Any], begun: bool) -> None:
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
