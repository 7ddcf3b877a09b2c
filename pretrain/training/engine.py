"""The training loop: pretraining, CTC, the unit language model and the vocoder run through `train`.

A `Task` supplies the model, the batches and, through the model's forward, a `Loss` (sum, count, metrics). The
engine divides the gradient once by the count over all ranks and accumulation steps, so any split of a global
batch gives the same update. Several processes (RANK, LOCAL_RANK, WORLD_SIZE, from torchrun or slurm/) use
DistributedDataParallel or FSDP2 (pretrain/training/parallel.py). Randomness is a function of (seed, epoch,
rank, step), so resuming from a checkpoint continues bit for bit. A run may go on with another number of
processes, `accumulate` or `sharding`: it stays the same up to rounding, and up to what is drawn by rank
(dropout). SIGTERM, SIGUSR2 and Ctrl-C stop it between two steps or within a validation
(pretrain/training/stopping.py), with a checkpoint from which it becomes the run that was not stopped, its log
included.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.store.lock import locked
from pretrain.training.checkpoint import latest_checkpoint, load_checkpoint
from pretrain.training.loading import load_ahead
from pretrain.training.parallel import replicate, scale_and_clip, shard
from pretrain.training.run import Run
from pretrain.training.runlog import Window
from pretrain.training.step import backward, mix_seed, validate
from pretrain.training.stopping import Stop, lost_ranks_told

# By `training.engine`: the function that trains a `Run`.
ENGINES = {
    "wordless": "pretrain.training.engine:train_here",
    "fairseq2": "pretrain.fairseq2.engine:train",
}


def train(run: Run) -> dict[str, Any]:
    """Trains to `max_steps` or `max_epochs`, from the newest checkpoint in `out` if there is one; returns the
    run's summary.

    A signal that stops the run (SIGTERM, SIGUSR2, SIGINT) is passed on once a checkpoint is written, and ends
    the process. If only the end is left to be written, that is done instead.

    Raises ValueError if `out` is finished, another process trains there, it was begun with other settings,
    has `patience` and nothing to validate on, or the run diverges or collapses (the last good checkpoint is
    named); ConnectionError if another rank is lost.
    """
    module, _, name = ENGINES[run.training.engine].partition(":")
    engine: Callable[[Run], dict[str, Any]] = getattr(import_module(module), name)
    with locked(run.folder):
        return engine(run)


def train_here(run: Run) -> dict[str, Any]:
    """The loop of this toolkit."""
    task, training, world = run.task, run.training, run.join()
    summary: dict[str, Any] = {}
    with lost_ranks_told(run.folder, world, lambda: max(run.folder.glob("step_*"), default=None)):
        checkpoint = run.find_checkpoint(lambda: _newest(run.folder), "fairseq2/checkpoints/step_*")
        run.prepare_model()
        if training.sharding == "full" and world.size > 1:
            shard(task.model, task.blocks(), world)
        else:
            task.model.to(world.device)
        adamw = run.make_optimizer()
        run.resume(load_checkpoint(run.folder / checkpoint, task.model, adamw) if checkpoint else {})
        run.open_log()
        batches = load_ahead(task, run.position, training, world)
        model, phase = task.model, None
        with Stop(world, training.collective_timeout_seconds) as stop, run.bar() as advance:
            stop.check(wait=True)
            for step in range(run.first - run.unseen, run.max_steps):
                if stop.signal or run.out_of_patience:
                    break
                if phase != task.phase(step):
                    phase = task.phase(step)
                    task.enter_phase(phase)
                    model = replicate(task.model, world)
                task.before_step(step)
                for group in adamw.param_groups:
                    factor = run.optimizer.factor(step, run.max_steps)
                    group["lr"] = run.optimizer.lr * group.get("lr_scale", 1.0) * factor
                if step >= run.first:
                    update(run, model, adamw, next(batches), step)
                    advance(1)
                    stop.check()
                if run.line_due and not write_line(run, adamw, stop, advance):
                    break
                if run.save_due:
                    run.save(adamw)
            batches.close()
            if not run.finished and run.saved < run.done:
                if run.window.sums:
                    metrics = task.describe(run.window.reduce(world))
                    run.require_sound(run.not_finite(metrics))
                run.save(adamw)
            summary = run.finish()
            if run.log is not None:
                run.log.close()
        model = task.model  # lets go of the wrapper
        world.leave()
    if not run.finished:
        stop.pass_on(run.folder, run.done)
    return summary


def update(run: Run, model: nn.Module, adamw: torch.optim.AdamW, loaded: Any, step: int) -> None:
    """One step: the gradients of a global batch, clipped, and the optimiser's update."""
    (epoch, batch), parts, micro_batches, amount = loaded
    training, world, window = run.training, run.world, run.window
    torch.manual_seed(mix_seed(training.seed, step, world.rank))
    count = backward(model, micro_batches, parts, window, training.precision, world)
    norm = scale_and_clip(run.task.model, world.size / count.clamp(min=1e-8), run.optimizer.clip_norm)
    window.add_norm(norm, step + 1)
    adamw.step()
    run.task.after_step(step)
    adamw.zero_grad(set_to_none=True)
    window.amount += amount
    run.done, run.position = step + 1, (epoch, batch + 1)


def write_line(run: Run, adamw: torch.optim.AdamW, stop: Stop, advance: Callable[..., None]) -> bool:
    """The line of the log after the last step, with a validation if it is due; False if a stop broke that
    off.

    Raises ValueError if the run has diverged or collapsed.
    """
    task, rate = run.task, run.window.rate()
    judgement = validate(task, run.world, run.training, stop) if run.validation_due else {}
    run.unseen = judgement is None
    if judgement is None:
        return False
    metrics = task.describe(run.window.reduce(run.world))
    metrics |= {"lr": adamw.param_groups[0]["lr"], f"{task.unit}_per_second": rate}
    metrics |= {f"valid_{name}": value for name, value in judgement.items()}
    run.judge(run.done, metrics)
    run.require_sound(run.fault(metrics))
    run.window = Window()
    if run.log is not None:
        run.log.write(run.done, metrics)
    advance(0, note=f"loss {metrics['loss']:.3f}")
    return True


def _newest(run: Path) -> str | None:
    path = latest_checkpoint(run)
    return None if path is None else path.name
