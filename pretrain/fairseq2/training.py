"""The second engine: a task under fairseq2's trainer, its gangs (DDP, FSDP2), mixed precision, checkpoint
manager and metric recorders.

What a step computes is ours and the same as in pretrain/training/engine.py: the plan, the micro-batches, the
seeds, the losses divided by their count over all ranks, clipping, AdamW, its schedule. What happens around it
is fairseq2's, in `RUN/fairseq2`:

    checkpoints/step_N/    its checkpoint manager's, written while training goes on; what a run goes on from
    metrics/*.jsonl, tb/   its recorders

A finished run also holds a checkpoint of ours (its last step, and its best if one is kept), the log, summary
and meta data.

Deviations from fairseq2's (0.8.1) ways, each through its public interfaces:
- Gradients are divided in a `DataParallelFacade`. Its `normalize_grads` waits for ever where one rank counts
  nothing, and wants the counts on the CPU.
- A trainer with a number of steps ignores a request to stop. So it has none, and is asked to stop after the
  last step.
- It saves a step before its loss is known, and then removes older checkpoints. So at least two are kept.
- It closes the process group itself while DDP still holds it, which may hang (see World.leave). So the root
  gang does not close.
- Its validator wants each metric twice. A `Validator` runs the engine's own validation.
"""

import math
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fairseq2.recipe  # noqa: F401  # before fairseq2.trainer, with which it imports in a circle
import torch
from fairseq2.checkpoint import NOOP_HG_EXPORTER
from fairseq2.early_stopper import NOOP_EARLY_STOPPER
from fairseq2.gang import Gangs
from fairseq2.metrics import MetricBag
from fairseq2.metrics.recorders import NOOP_METRIC_RECORDER, MetricRecorder
from fairseq2.nn.data_parallel import get_data_parallel_facade, set_data_parallel_facade
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
from pretrain.fairseq2.facade import CountedFacade
from pretrain.fairseq2.parallel import causes_told, gangs_of, wrapped
from pretrain.fairseq2.patience import Patience
from pretrain.fairseq2.reader import MicroBatch, TaskReader
from pretrain.fairseq2.recording import Sums, recorder
from pretrain.training.checkpoint import Best
from pretrain.training.parallel import scale_and_clip
from pretrain.training.run import Run
from pretrain.training.step import autocast_dtype, mix_seed, validate, weighted
from pretrain.training.stopping import Stop, lost_ranks_told


def train_with_fairseq2(run: Run) -> dict[str, Any]:
    """Trains `run` under fairseq2's trainer; returns the summary. Errors as in
    pretrain.training.engine.train."""
    training, world = run.training, run.join()
    folder = run.folder / "fairseq2"
    with lost_ranks_told(run.folder, world, lambda: newest_checkpoint(folder)), causes_told(folder):
        sharded = training.sharding == "full" and world.size > 1
        found = run.find_checkpoint(lambda: last_step(folder), "step_*")
        if found is not None:
            require_fitting_shards(folder, found, world.size if sharded else 1)
        run.prepare_model()
        run.first = run.done = found or 0
        steps = _Steps(run, folder)
        stop = steps.train(gangs_of(world, sharded), sharded)
        run.unseen = steps.owed
        summary = run.finish()
        del steps  # with the DDP in it
        world.leave()
    if not run.finished:
        stop.pass_on(run.folder, run.done)
    return summary


class _Steps(TrainUnit[MicroBatch]):  # type: ignore[misc]  # fairseq2's classes are Any where it is not installed
    """The steps of a run, as fairseq2's trainer asks for them, and what lies between two."""

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder, self.world = run, folder, run.world
        training = run.training
        self.window_began = time.monotonic()
        # fairseq2 wants the other intervals to be multiples of that of its metrics.
        self.publish_every = math.gcd(training.log_every, training.checkpoint_every, training.validate_every)
        self.phase: int | None = None
        self.count = torch.zeros((), device=run.world.device)  # of this step and rank
        self.parts, self.amount = 1, 0.0
        self.asked = False  # the trainer was asked to stop
        self.best_due = False  # the best checkpoint is that of the last step, and is not written yet
        self.refusal: str | None = None  # of the first rank: why the run must not go on
        self.judged: set[int] = set()  # steps whose validation is in the log
        run.open_log()
        self._recall()

    def _recall(self) -> None:
        """Reads the validations before `first` from the log."""
        run, lines = self.run, []
        if run.log is not None:
            lines = [line for line in run.log.lines if any(key.startswith("valid_") for key in line)]
        for line in self.world.from_first(lines):
            self.judge(line["step"], line)
        state, run.best = run.best.to_state(), Best(run.best.monitor)
        run.best.resume(run.folder, {**state, "step": run.first}, self.world)
        self.best_due = run.first > 0 and run.best.step == run.first

    def train(self, gangs: Gangs, sharded: bool) -> Stop:
        """Runs the trainer to the end of training, or until a signal."""
        run, task, training = self.run, self.run.task, self.run.training
        self.manager = checkpoint_manager(self.folder, gangs)
        last_phase = task.phase(run.max_steps - 1)
        self.placed = wrapped(task, gangs, sharded, last_phase != task.phase(0), last_phase)
        adamw = self.adamw = run.make_optimizer()
        adamw.register_step_post_hook(lambda *_: task.after_step(run.done - 1))
        for group in adamw.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        self.reader = TaskReader(run, self.ended)
        set_data_parallel_facade(
            self.placed, CountedFacade(get_data_parallel_facade(self.placed), self.step_done)
        )
        metrics = recorder(self.folder, run.log) if run.log is not None else NOOP_METRIC_RECORDER
        self.validator = _TaskValidator(self, metrics) if task.plan_validation() else NOOP_VALIDATOR
        with Stop(self.world, training.collective_timeout_seconds) as self.stop, run.bar() as self.advance:
            self.stop.check(wait=True)
            self.trainer = self._trainer(gangs, sharded, metrics)
            with suppress(TaskStopException):  # how it ends when it was asked to
                self.trainer.run()
            self.reader.close()
            self.require_sound()
            if self.finished or self.best_due:
                self.save()
            metrics.close()
        return self.stop

    def _trainer(self, gangs: Gangs, sharded: bool, metrics: MetricRecorder) -> Trainer:
        run, training, wall = self.run, self.run.training, Stopwatch()
        last = run.max_steps - 1
        wall.start()
        dtype = autocast_dtype(training.precision, self.world.device)

        def factor(step: int) -> float:
            return run.optimizer.factor(min(step, last), run.max_steps)

        return Trainer(
            model=self.placed,
            unit=self,
            data_reader=self.reader,
            gangs=gangs,
            amp=dtype != torch.float32,
            amp_dtype=dtype,
            optimizer=self.adamw,
            lr_scheduler=LambdaLR(self.adamw, factor),
            fp16_loss_scaler=NOOP_FP16_LOSS_SCALER,
            validator=self.validator,
            early_stopper=Patience(run) if training.patience is not None else NOOP_EARLY_STOPPER,
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
            max_grad_norm=run.optimizer.clip_norm or None,
            validate_every_n_steps=training.validate_every or None,
            publish_metrics_every_n_steps=self.publish_every,
            checkpoint_every_n_steps=training.checkpoint_every,
            keep_last_n_checkpoints=max(training.keep_checkpoints, 2),
        )

    @property
    def owed(self) -> bool:
        """Whether the validation after the step done last is still to be done: a stop, or a kill, came before
        it."""
        done, validated = self.run.done, self.validator is not NOOP_VALIDATOR
        return self.run.validation_due and done > 0 and done not in self.judged and validated

    @property
    def finished(self) -> bool:
        self.run.unseen = self.owed
        return self.run.finished

    def ended(self) -> bool:
        """Asked before every step: whether none follows. What the one before has left to do is done here."""
        run = self.run
        if run.done == run.first and self.owed:
            run.task.before_step(run.done - 1)  # what it had set when the step was done
            self.placed.eval()
            with get_data_parallel_facade(self.placed).summon_full_parameters():
                self.validator.run(run.done)
            self.placed.train()
        if run.done % self.publish_every == 0:
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
        step, task = step_nr - 1, self.run.task
        if self.phase != task.phase(step):
            self.phase = task.phase(step)
            task.enter_phase(self.phase)
        task.before_step(step)
        torch.manual_seed(mix_seed(self.run.training.seed, step, self.world.rank))
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
        norm = scale_and_clip(self.run.task.model, scale, self.run.optimizer.clip_norm)
        self.metric_bag.get("task", Sums).add("gradient_norm", norm, 1.0)
        self.amount += self.reader.amount
        self.run.done += 1
        self.advance(1)
        if self.stop.check() or self.run.done == self.run.max_steps:
            self.ask_to_stop()
        return norm

    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        """Called on the first rank: what the task says of its metrics, for every recorder."""
        reduced = values.pop("task")
        assert isinstance(reduced, dict)
        run = self.run
        assert run.log is not None
        if not reduced:  # stopped right after a line
            return
        described = run.task.describe(reduced)
        values.update(described)
        rate = self.amount / max(time.monotonic() - self.window_began, 1e-9)
        self.amount, self.window_began = 0.0, time.monotonic()
        factor = run.optimizer.factor(run.done - 1, run.max_steps)
        lr = run.optimizer.lr * self.adamw.param_groups[0].get("lr_scale", 1.0) * factor
        metrics = {**described, "lr": lr, f"{run.task.unit}_per_second": rate}
        run.log.write(run.done, metrics)
        self.advance(0, note=f"loss {metrics['loss']:.3f}")
        self.examine(metrics)

    def examine(self, metrics: dict[str, float]) -> None:
        """On the first rank: whether the run must not go on."""
        self.refusal = self.refusal or self.run.fault(metrics)

    def require_sound(self) -> None:
        """On every rank: a ValueError where the first one has found that the run must not go on; this step's
        checkpoint goes."""
        reason = self.world.from_first(self.refusal)
        if reason is None:
            return
        self.manager.maybe_complete_save_operation(blocking=True)
        self.manager.delete_checkpoint(self.run.done)
        self.run.require_sound(reason, newest_checkpoint(self.folder))

    def judge(self, step: int, metrics: dict[str, float]) -> float | None:
        """Records a validation on every rank; the score of `keep_best`, of which fairseq2 wants the higher,
        or None."""
        self.judged.add(step)
        values = self.run.judge(step, metrics)
        if values is None:
            return None
        self.best_due = self.run.best.step == step
        return -float(values[0])

    def save(self) -> None:
        """Writes a checkpoint of ours after the last step: the best so far, or the end of the run."""
        self.run.save(self.adamw, keep=1)
        self.best_due = False


class _TaskValidator(Validator):  # type: ignore[misc]
    """The engine's validation, recorded by fairseq2's recorders."""

    def __init__(self, steps: _Steps, metrics: MetricRecorder):
        self._steps, self._metrics = steps, metrics

    def run(self, train_step_nr: int) -> float | None:
        """The score of `keep_best`; None without, where this step was validated before, and where a signal
        broke it off."""
        steps = self._steps
        if train_step_nr in steps.judged:
            return None
        judgement = validate(steps.run.task, steps.world, steps.run.training, steps.stop)
        if judgement is None:
            steps.ask_to_stop()
            return None
        values = {f"valid_{name}": value for name, value in judgement.items()}
        if (log := steps.run.log) is not None:
            self._metrics.record_metric_values("valid", values, train_step_nr)
            steps.examine(log.lines[-1])
        # a line has just been written: the next has the rate of training alone
        steps.window_began = time.monotonic()
        return steps.judge(train_step_nr, values)

    def reset(self) -> None: ...
