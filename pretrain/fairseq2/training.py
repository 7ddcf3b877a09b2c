"""The second engine: a task under fairseq2's trainer, its gangs (DDP, FSDP2), mixed precision, checkpoint manager and metric recorders.

What a step computes is ours and the same as in pretrain/training/engine.py: the plan, the micro-batches, the seeds, the losses divided by
their count over all ranks, clipping, AdamW, its schedule. What happens around it is fairseq2's, in `RUN/fairseq2`:

    checkpoints/step_N/    its checkpoint manager's, written while training goes on; what a run goes on from
    metrics/*.jsonl, tb/   its recorders

A finished run holds beside them a checkpoint of ours (its last step, and its best where one is kept), `metrics.jsonl`, TensorBoard
events, summary and meta data: whatever takes a run takes it.

Some of fairseq2's (0.8.1) ways are gone around, each through its public interfaces:
- Gradients are divided in a `DataParallelFacade`. Its `normalize_grads` waits for ever where one rank counts nothing, and wants
  the counts on the CPU.
- A trainer that was told how many steps to run ignores a request to stop. So it is not told, and asked to stop after the last step.
- It saves a step before the loss of that step is known, and removes older checkpoints then. So two are kept at least, one that is good
  among them.
- It closes the process group itself while DDP still holds it, which may hang (see World.leave). So the root gang does not close.
- Its validator would want each metric twice. A `Validator` runs the engine's own validation.
"""

import math
import time
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import fairseq2.recipe  # noqa: F401  # before fairseq2.trainer, with which it imports in a circle
import torch
from fairseq2.checkpoint import NOOP_HG_EXPORTER
from fairseq2.early_stopper import NOOP_EARLY_STOPPER, EarlyStopper
from fairseq2.gang import Gangs
from fairseq2.metrics import MetricBag
from fairseq2.metrics.recorders import NOOP_METRIC_RECORDER, MetricRecorder
from fairseq2.nn.data_parallel import DataParallelFacade, get_data_parallel_facade, set_data_parallel_facade
from fairseq2.optim.fp16_loss_scaler import NOOP_FP16_LOSS_SCALER
from fairseq2.profilers import NOOP_PROFILER
from fairseq2.task import TaskStopException
from fairseq2.trainer import Trainer, TrainUnit
from fairseq2.utils.device_stat import NOOP_DEVICE_STAT_TRACKER
from fairseq2.utils.gc import NOOP_GARBAGE_COLLECTOR
from fairseq2.utils.progress import NOOP_PROGRESS_REPORTER
from fairseq2.utils.stopwatch import Stopwatch
from fairseq2.validator import NOOP_VALIDATOR, Validator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pretrain.fairseq2.checkpoints import (
    checkpoint_manager,
    last_step,
    newest_checkpoint,
    require_fitting_shards,
)
from pretrain.fairseq2.parallel import causes_told, gangs_of, wrapped
from pretrain.fairseq2.reader import MicroBatch, TaskReader
from pretrain.fairseq2.recording import Sums, recorder
from pretrain.progress import progress
from pretrain.store.artefact import require_absent
from pretrain.training.checkpoint import Best, remove_old_checkpoints, save_checkpoint
from pretrain.training.engine import (
    autocast_dtype,
    conclude,
    make_optimizer,
    mix_seed,
    not_finite,
    num_steps,
    prepare,
    resume_point,
    validate,
    weighted,
)
from pretrain.training.memory import keep_freed_memory
from pretrain.training.parallel import World, scale_and_clip
from pretrain.training.runlog import RunLog
from pretrain.training.stopping import Stop, lost_ranks_told
from pretrain.training.task import OptimizerConfig, Task, TrainingConfig


def train_with_fairseq2(
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
    """`pretrain.training.engine.train` under fairseq2's trainer: the same arguments, summary and errors."""
    run, extra = Path(out), extra or {}
    require_absent(run)
    world = World.join(training.device, training.collective_timeout_seconds)
    if world.device.type == "cpu":
        keep_freed_memory()
    max_steps = num_steps(task, training, run)
    folder = run / "fairseq2"
    with lost_ranks_told(run, world, lambda: newest_checkpoint(folder)), causes_told(folder):
        sharded = training.sharding == "full" and world.size > 1
        found = resume_point(run, config, world, lambda: last_step(folder), "step_*")
        if found is not None:
            require_fitting_shards(folder, found, world.size if sharded else 1)
        prepare(task, training)
        stored = {"kind": kind, "extra": extra, "config": config}
        steps = _Steps(task, run, training, optimizer, world, max_steps, Best(monitor), found or 0, stored)
        stop = steps.train(gangs_of(world, sharded), sharded)
        finished, done, log = steps.finished, steps.done, steps.log
        summary: dict[str, Any] = {}
        if finished and log is not None:
            summary = log.summarise(done, steps.reader.seconds, done - steps.first)
            if training.patience is not None:
                summary["stopped_early"] = done < max_steps
            summary = conclude(run, summary, done, steps.best, kind, config, parents, extra)
        del steps  # with the DDP in it
        world.leave()
    if not finished:
        stop.pass_on(run, done)
    return summary


class _Steps(TrainUnit[MicroBatch]):  # type: ignore[misc]  # fairseq2's classes are Any where it is not installed
    """The steps of a run, as fairseq2's trainer asks for them, and what lies between two."""

    def __init__(
        self,
        task: Task,
        run: Path,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        world: World,
        max_steps: int,
        best: Best,
        first: int,
        stored: dict[str, Any],
    ):
        self.task, self.run, self.folder, self.training, self.optimizer = (
            task,
            run,
            run / "fairseq2",
            training,
            optimizer,
        )
        self.world, self.max_steps, self.best, self.stored = world, max_steps, best, stored
        self.first = self.done = first
        self.window_began = time.monotonic()
        # fairseq2 wants the other intervals to be multiples of that of its metrics.
        self.publish_every = math.gcd(training.log_every, training.checkpoint_every, training.validate_every)
        self.phase: int | None = None
        self.count = torch.zeros((), device=world.device)  # of this step and rank
        self.parts, self.amount = 1, 0.0
        self.asked = False  # the trainer was asked to stop
        self.best_due = False  # the best checkpoint is that of the step done last, and is not written yet
        self.refusal: str | None = None  # of the first rank: why the run must not go on
        self.judged: set[int] = set()  # steps whose validation is in the log
        self.log = RunLog(run, first) if world.rank == 0 else None
        self._recall()

    def _recall(self) -> None:
        """What validations before `first` have said, from the log."""
        lines = (
            []
            if self.log is None
            else [line for line in self.log.lines if any(key.startswith("valid_") for key in line)]
        )
        for line in self.world.from_first(lines):
            self.judge(line["step"], line)
        said, self.best = self.best.to_state(), Best(self.best.monitor)
        self.best.resume(self.run, {**said, "step": self.first}, self.world)
        self.best_due = self.first > 0 and self.best.step == self.first

    def train(self, gangs: Gangs, sharded: bool) -> Stop:
        """Run the trainer to the end of training, or until a signal."""
        training, task, world = self.training, self.task, self.world
        self.manager = checkpoint_manager(self.folder, gangs)
        self.placed = wrapped(
            task,
            gangs,
            sharded,
            task.phase(self.max_steps - 1) != task.phase(0),
            task.phase(self.max_steps - 1),
        )
        self.adamw = make_optimizer(task, self.optimizer)
        for group in self.adamw.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        last = self.max_steps - 1
        schedule = LambdaLR(self.adamw, lambda step: self.optimizer.factor(min(step, last), self.max_steps))
        self.reader = TaskReader(task, training, world, self.ended)
        set_data_parallel_facade(self.placed, _CountedFacade(get_data_parallel_facade(self.placed), self))
        metrics = recorder(self.folder, self.log) if self.log is not None else NOOP_METRIC_RECORDER
        self.validator = _TaskValidator(self, metrics) if task.plan_validation() else NOOP_VALIDATOR
        wall = Stopwatch()
        wall.start()
        bar: Any = nullcontext(lambda *_, **__: None)
        if world.rank == 0:
            bar = progress(f"train {self.run.name}", self.max_steps, "step", done=self.first)
        with Stop(world, training.collective_timeout_seconds) as self.stop, bar as self.advance:
            self.stop.check(wait=True)
            dtype = autocast_dtype(training.precision, world.device)
            self.trainer = Trainer(
                model=self.placed,
                unit=self,
                data_reader=self.reader,
                gangs=gangs,
                amp=dtype != torch.float32,
                amp_dtype=dtype,
                optimizer=self.adamw,
                lr_scheduler=schedule,
                fp16_loss_scaler=NOOP_FP16_LOSS_SCALER,
                validator=self.validator,
                early_stopper=_Patience(self) if training.patience is not None else NOOP_EARLY_STOPPER,
                checkpoint_manager=self.manager,
                hg_exporter=NOOP_HG_EXPORTER,
                metric_recorder=metrics,
                garbage_collector=NOOP_GARBAGE_COLLECTOR,
                profiler=NOOP_PROFILER,
                device_stat_tracker=NOOP_DEVICE_STAT_TRACKER,
                wall_watch=wall,
                progress_reporter=NOOP_PROGRESS_REPORTER,
                seed=training.seed % 2**31,
                no_sync_grad_accumulation=not sharded,
                max_grad_norm=self.optimizer.clip_norm or None,
                validate_every_n_steps=training.validate_every or None,
                publish_metrics_every_n_steps=self.publish_every,
                checkpoint_every_n_steps=training.checkpoint_every,
                keep_last_n_checkpoints=max(training.keep_checkpoints, 2),
            )
            with suppress(TaskStopException):  # how it ends when it was asked to
                self.trainer.run()
            self.reader.close()
            self.require_sound()
            if self.finished or self.best_due:
                self.save()
            metrics.close()
        return self.stop

    @property
    def out_of_patience(self) -> bool:
        return self.training.patience is not None and self.best.stale >= self.training.patience

    @property
    def owed(self) -> bool:
        """Whether the validation after the step done last is still to be done: a stop, or a kill, came before it."""
        every = self.training.validate_every
        due = self.done == self.max_steps or bool(every and self.done % every == 0)
        return due and self.done > 0 and self.done not in self.judged and self.validator is not NOOP_VALIDATOR

    @property
    def finished(self) -> bool:
        return not self.owed and (self.done == self.max_steps or self.out_of_patience)

    def ended(self) -> bool:
        """Asked before every step: whether none follows. What the one before has left to do is done here."""
        if self.done == self.first and self.owed:
            self.task.before_step(self.done - 1)  # what it had set when the step was done
            self.placed.eval()
            with get_data_parallel_facade(self.placed).summon_full_parameters():
                self.validator.run(self.done)
            self.placed.train()
        if self.done % self.publish_every == 0:
            self.require_sound()
        if self.best_due:
            self.save()
        if self.finished or self.stop.signal:
            self.ask_to_stop()
        return self.asked

    def ask_to_stop(self) -> None:
        self.asked = True
        self.trainer.request_stop()

    # What TrainUnit asks for.

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        metric_bag.add("task", Sums())
        self.metric_bag = metric_bag

    def set_step_nr(self, step_nr: int) -> None:
        """`step_nr`, from 1, begins."""
        step = step_nr - 1
        if self.phase != self.task.phase(step):
            self.phase = self.task.phase(step)
            self.task.enter_phase(self.phase)
        self.task.before_step(step)
        torch.manual_seed(mix_seed(self.training.seed, step, self.world.rank))
        self.count, self.parts = torch.zeros((), device=self.world.device), 0

    def process_batch(self, batch: MicroBatch, metric_bag: MetricBag) -> tuple[Tensor, None]:
        """The sum of the losses of a micro-batch. None in place of their number: `step_done` divides."""
        loss = weighted(self.placed(batch.content), batch.weight)
        self.count += loss.count
        self.parts += 1
        metric_bag.get("task", Sums).update(loss)
        return loss.total, None

    def step_done(self) -> Tensor:
        """All gradients are there: divide and clip them. Returns their norm before clipping."""
        # The trainer has divided by the number of micro-batches.
        scale = self.world.size * self.parts / self.world.sum(self.count).clamp(min=1e-8)
        norm = scale_and_clip(self.task.model, scale, self.optimizer.clip_norm)
        self.metric_bag.get("task", Sums).add("gradient_norm", norm, 1.0)
        self.amount += self.reader.amount
        self.done += 1
        self.advance(1)
        if self.stop.check() or self.done == self.max_steps:
            self.ask_to_stop()
        return norm

    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        """Called on the first rank: what the task says of its metrics, for every recorder."""
        reduced = values.pop("task")
        assert isinstance(reduced, dict)
        assert self.log is not None
        if not reduced:  # stopped right after a line
            return
        described = self.task.describe(reduced)
        values.update(described)
        rate = self.amount / max(time.monotonic() - self.window_began, 1e-9)
        self.amount, self.window_began = 0.0, time.monotonic()
        factor = self.optimizer.factor(self.done - 1, self.max_steps)
        lr = self.optimizer.lr * self.adamw.param_groups[0].get("lr_scale", 1.0) * factor
        metrics = {**described, "lr": lr, f"{self.task.unit}_per_second": rate}
        self.log.write(self.done, metrics)
        self.advance(0, note=f"loss {metrics['loss']:.3f}")
        self.examine(metrics)

    def examine(self, metrics: dict[str, float]) -> None:
        """On the first rank: whether the run must not go on."""
        reason = not_finite(metrics, None, self.training, self.optimizer) or self.task.alarm(
            metrics, self.done
        )
        self.refusal = self.refusal or reason

    def require_sound(self) -> None:
        """On every rank: a ValueError where the first one has found that the run must not go on; this step's checkpoint goes."""
        reason = self.world.from_first(self.refusal)
        if reason is None:
            return
        self.manager.maybe_complete_save_operation(blocking=True)
        self.manager.delete_checkpoint(self.done)
        kept = newest_checkpoint(self.folder) or "none yet"
        raise ValueError(
            f"{self.run}: stopped at step {self.done}: {reason.removesuffix('.')}. The last good checkpoint: {kept}"
        )

    def judge(self, step: int, metrics: dict[str, float]) -> float | None:
        """Take down a validation on every rank; the score of `keep_best`, of which fairseq2 wants the higher, or None."""
        self.judged.add(step)
        if not self.training.keep_best or any(name not in metrics for name in self.best.monitor):
            return None
        values = self.world.from_first([metrics[name] for name in self.best.monitor])
        self.best_due = self.best.judge(
            step, values, counts=self.task.phase(step - 1) == self.task.phase(self.max_steps - 1)
        )
        return -float(values[0])

    def save(self) -> None:
        """Write a checkpoint of ours after the step done last: the best so far, or the end of the run."""
        epoch, batch = self.reader.position
        state = {"epoch": epoch, "batch": batch, "seconds": self.reader.seconds, **self.stored}
        state |= self.best.to_state() if self.training.keep_best else {}
        main = self.world.rank == 0
        save_checkpoint(self.run, self.done, self.task.model, self.adamw, state, write=main)
        if main:
            remove_old_checkpoints(self.run, 1, self.best.step, self.done)
        self.world.barrier()
        self.best_due = False


class _CountedFacade(DataParallelFacade):  # type: ignore[misc]
    """What fairseq2 asks of a data-parallel model: as its own, and the step's gradients divided by what all ranks count."""

    def __init__(self, inner: DataParallelFacade, steps: _Steps):
        self._inner, self._steps = inner, steps

    def state_dict(self) -> dict[str, object]:
        return dict(self._inner.state_dict())

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._inner.load_state_dict(state_dict)

    def no_sync(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._inner.no_sync()
        return context

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        return self._steps.step_done()

    def summon_full_parameters(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._inner.summon_full_parameters()
        return context


class _TaskValidator(Validator):  # type: ignore[misc]
    """The engine's validation, recorded by fairseq2's recorders."""

    def __init__(self, steps: _Steps, metrics: MetricRecorder):
        self._steps, self._metrics = steps, metrics

    def run(self, train_step_nr: int) -> float | None:
        """The score of `keep_best`; None without, where this step was validated before, and where a signal broke it off."""
        steps = self._steps
        if train_step_nr in steps.judged:
            return None
        judgement = validate(steps.task, steps.world, steps.training, steps.stop)
        if judgement is None:
            steps.ask_to_stop()
            return None
        values = {f"valid_{name}": value for name, value in judgement.items()}
        if steps.log is not None:
            self._metrics.record_metric_values("valid", values, train_step_nr)
            steps.examine(steps.log.lines[-1])
        steps.window_began = (
            time.monotonic()
        )  # a line has just been written: the next tells the rate of training alone
        return steps.judge(train_step_nr, values)

    def reset(self) -> None: ...


class _Patience(EarlyStopper):  # type: ignore[misc]
    """Whether `patience` validations in a row were not the best."""

    def __init__(self, steps: _Steps):
        self._steps = steps

    def should_stop(self, step_nr: int, score: float) -> bool:
        return self._steps.out_of_patience
