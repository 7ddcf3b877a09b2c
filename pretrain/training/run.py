"""A run of training: its settings, how far it is, its checkpoints, its log, its end. Both engines train one.

The folder of a run holds checkpoints (pretrain/training/checkpoint.py), `config.toml`, the log
(pretrain/training/runlog.py), and at the end `summary.json` and `meta.json`.
"""

import math
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import torch

from pretrain.config import differences, without_none
from pretrain.progress import progress
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path, write_json
from pretrain.training.checkpoint import Best, checkpoint_path, remove_old_checkpoints, save_checkpoint
from pretrain.training.memory import keep_freed_memory
from pretrain.training.parallel import World, compile_in_place, recompute_in_backward
from pretrain.training.runlog import RunLog, Window
from pretrain.training.task import NEUTRAL, OptimizerConfig, Task, TrainingConfig

Found = TypeVar("Found", str, int)


class Run:
    """What is trained, how, and how far it is.

    `done` steps are done, of which `first` before this session; `position` is (epoch, batch) of the next
    batch. `unseen`: the last step is done, and its log line and validation are not, since a stop came
    between. `monitor` are the metrics that `keep_best` and `patience` go by (see Best); `config`, `parents`
    and `extra` go into the meta data.
    """

    def __init__(
        self,
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
    ):
        self.task, self.folder, self.kind = task, Path(out), kind
        self.training, self.optimizer = training, optimizer
        self.config, self.parents, self.extra = config, parents, extra or {}
        self.best = Best(monitor)
        self.first = self.done = self.saved = 0
        self.position = 0, 0
        self.window, self.unseen = Window(), False
        self.log: RunLog | None = None
        self.save_wanted = False  # by the validation after the last step
        self.began = time.monotonic()
        self.world: World  # by `join`

    def join(self) -> World:
        """Joins the other ranks, and counts the steps. Raises ValueError if `out` is finished."""
        require_absent(self.folder)
        self.world = World.join(self.training.device, self.training.collective_timeout_seconds)
        if self.world.device.type == "cpu":
            keep_freed_memory()
        self.max_steps = self._num_steps()
        return self.world

    def _num_steps(self) -> int:
        """`max_steps`, or the steps of `max_epochs` if they are fewer."""
        task, training = self.task, self.training
        if training.patience is not None and not task.plan_validation():
            raise ValueError(
                f"{self.folder}: training.patience needs a validation set, and there is none; name one or "
                "leave the key out"
            )
        if training.max_epochs is None:
            return training.max_steps
        return max(1, min(training.max_steps, round(training.max_epochs * len(task.plan(0)))))

    def prepare_model(self) -> None:
        """The model recomputed and compiled as configured; before it is wrapped, sharded or moved."""
        blocks = self.task.blocks()
        if self.training.activation_checkpointing and not blocks:
            raise ValueError(
                "training.activation_checkpointing: this model has no blocks to recompute; leave the key out"
            )
        if self.training.compile:
            compile_in_place(self.task.model, blocks)
        if self.training.activation_checkpointing:
            recompute_in_backward(blocks)

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over the task's groups; made after the model is sharded or moved."""
        config = self.optimizer
        options: dict[str, Any] = {
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        return torch.optim.AdamW(self.task.parameter_groups(), lr=config.lr, fused=True, **options)

    def find_checkpoint(self, newest: Callable[[], Found | None], of_other_engine: str) -> Found | None:
        """The name or number of the newest whole checkpoint, by `newest`; None if the run begins here.

        `of_other_engine` is a glob of the other engine's checkpoints: a run that has some was begun by it.
        The first rank alone reads and decides, so that all ranks go on from the same step. Raises ValueError
        if the run was begun with other settings.
        """
        found: Found | None = None
        refusal: Exception | None = None
        if self.world.rank == 0:
            try:
                found = newest()
                begun = found is not None or any(self.folder.glob(of_other_engine))
                write_or_compare_config(self.folder, self.config, begun)
            except (ValueError, OSError) as error:
                refusal = error
        found, refused = self.world.from_first([found, refusal and str(refusal)])
        if refused is not None:
            raise refusal or ValueError(refused)
        return found

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a checkpoint; one without keys is the beginning."""
        self.first = self.done = self.saved = state.get("step", 0)
        self.position = state.get("epoch", 0), state.get("batch", 0)
        self.began = time.monotonic() - state.get("seconds", 0.0)
        self.unseen = state.get("unseen", False)
        self.window = Window.from_state(state.get("window", {}), self.world)
        if self.training.keep_best:
            self.best.resume(self.folder, state, self.world)

    def open_log(self) -> None:
        """On the first rank: the log, without lines of steps that are repeated."""
        self.log = RunLog(self.folder, self.first - self.unseen) if self.world.rank == 0 else None

    def bar(self) -> AbstractContextManager[Callable[..., None]]:
        """The progress bar of the first rank."""
        if self.world.rank:
            return nullcontext(lambda *_, **__: None)
        return progress(f"train {self.folder.name}", self.max_steps, "step", done=self.first)

    @property
    def seconds(self) -> float:
        """Of training, all sessions together."""
        return time.monotonic() - self.began

    @property
    def out_of_patience(self) -> bool:
        return self.training.patience is not None and self.best.stale >= self.training.patience

    @property
    def finished(self) -> bool:
        return not self.unseen and (self.done == self.max_steps or self.out_of_patience)

    @property
    def validation_due(self) -> bool:
        every = self.training.validate_every
        return self.done == self.max_steps or bool(every and self.done % every == 0)

    @property
    def save_due(self) -> bool:
        end = self.done == self.max_steps
        return end or self.done % self.training.checkpoint_every == 0 or self.save_wanted

    @property
    def line_due(self) -> bool:
        return self.save_due or self.validation_due or self.done % self.training.log_every == 0

    def judge(self, step: int, metrics: dict[str, float]) -> list[float] | None:
        """Compares a validation after `step` with the best, on every rank; returns its values, None if there
        is nothing to compare.

        Validations before the last phase, while a part of the model is frozen, do not count against the
        patience.
        """
        if not self.training.keep_best or any(name not in metrics for name in self.best.monitor):
            return None
        values: list[float] = self.world.from_first([metrics[name] for name in self.best.monitor])
        phases = self.task.phase(step - 1), self.task.phase(self.max_steps - 1)
        better = self.best.judge(step, values, counts=phases[0] == phases[1])
        self.save_wanted = better or self.best.stale == self.training.patience
        return values

    def fault(self, metrics: dict[str, float]) -> str | None:
        """Why the run must not go on, by the metrics of a line: not finite, or collapsed. None if it may."""
        return self.not_finite(metrics) or self.task.alarm(metrics, self.done)

    def not_finite(self, metrics: dict[str, float]) -> str | None:
        """The message on a loss or gradient norm that is not finite; None if both are finite."""
        broken = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics.get(name, 0.0))]
        if not broken:
            return None
        optimizer, first = self.optimizer, self.window.first_not_finite
        since = f", first in step {first}" if first else ""
        unclipped = "" if optimizer.clip_norm else ": nothing is clipped"
        reason = (
            f"{' and '.join(broken)} not finite{since}. Try a lower optimizer.lr (now {optimizer.lr:g}), a "
            f"longer optimizer.warmup_steps (now {optimizer.warmup_steps}), a lower optimizer.clip_norm (now "
            f"{optimizer.clip_norm:g}{unclipped})"
        )
        if self.training.precision == "float32":
            return reason
        return f'{reason} or, if it ran in bfloat16, training.precision = "float32"'

    def require_sound(self, fault: str | None, kept: Path | None = None) -> None:
        """Raises ValueError for a fault; `kept` is the last good checkpoint."""
        if fault:
            kept = kept or (checkpoint_path(self.folder, self.saved) if self.saved else None)
            raise ValueError(
                f"{self.folder}: stopped at step {self.done}: {fault.removesuffix('.')}. The last good "
                f"checkpoint: {kept or 'none yet'}"
            )

    def save(self, adamw: torch.optim.AdamW, keep: int | None = None) -> None:
        """Writes the checkpoint of the last step; removes all but the newest `keep` and the best."""
        state: dict[str, Any] = {
            "epoch": self.position[0],
            "batch": self.position[1],
            "seconds": self.seconds,
        }
        state |= self.best.to_state() if self.training.keep_best else {}
        if part := self.window.to_state(self.world):
            state |= {"window": part, "unseen": self.unseen}
        state |= {"kind": self.kind, "extra": self.extra, "config": self.config}
        main = self.world.rank == 0
        save_checkpoint(self.folder, self.done, self.task.model, adamw, state, write=main)
        if main:
            keep = keep or self.training.keep_checkpoints
            remove_old_checkpoints(self.folder, keep, self.best.step, self.done)
        self.world.barrier()
        self.saved, self.save_wanted = self.done, False

    def finish(self) -> dict[str, Any]:
        """On the first rank, of a run that is finished: writes the summary and completes the run. Returns the
        summary."""
        if not self.finished or self.log is None:
            return {}
        summary = self.log.summarise(self.done, self.seconds, self.done - self.first)
        if self.training.patience is not None:
            summary["stopped_early"] = self.done < self.max_steps
        if self.best.step is not None:
            summary |= {"best_step": self.best.step, **self.best.summary}
        write_json(self.folder / "summary.json", summary)
        kept = {self.done, self.done if self.best.step is None else self.best.step}
        files = [f"step_{step:08d}/model.safetensors" for step in sorted(kept)]
        commit(self.folder, self.kind, self.config, self.parents, files, **self.extra)
        return summary


def write_or_compare_config(run: Path, config: dict[str, Any], begun: bool) -> None:
    """Writes `config.toml`. Raises ValueError if the work in `run` has `begun` with other settings."""
    text = tomli_w.dumps(without_none(config))
    path = run / "config.toml"
    if begun and path.is_file() and path.read_text(encoding="utf-8") != text:
        changes = differences(tomllib.loads(path.read_text(encoding="utf-8")), tomllib.loads(text))
        changed = "; ".join(f"{key}: {old!r}, now {new!r}" for key, old, new in changes if key not in NEUTRAL)
        if changed:
            raise ValueError(
                f"{run}: holds unfinished work begun with other settings ({changed}); restore them or remove "
                "the folder"
            )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
