"""What a run tells of itself: sums of metrics between two log lines, `metrics.jsonl`, TensorBoard events, the
summary.

Both logs are written at once and record by record, without a buffer or a thread of a library: on a full disk
the run ends with a message at the line that did not fit, of which nothing stays, and the last checkpoint
stands.
"""

import itertools
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.store.disk import atomic_path, make_folder, telling_full_disk
from pretrain.training.parallel import World

if TYPE_CHECKING:
    from pretrain.training.task import Loss


class Window:
    """Sums of metrics since the last log line, on the device: nothing here waits for it until `reduce`."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.amount = 0.0
        self.began = time.monotonic()
        self._not_finite: Tensor | None = None  # the first step whose gradient was not

    def add(self, loss: "Loss") -> None:
        for name, (total, count) in {"loss": (loss.total, loss.count), **loss.metrics}.items():
            self._add(
                name, total.detach().double(), torch.as_tensor(count, device=total.device).detach().double()
            )

    def add_norm(self, norm: Tensor, step: int) -> None:
        """The gradient's norm in `step` (from 1)."""
        self._add("gradient_norm", norm.double(), torch.ones_like(norm).double())
        here = torch.where(norm.isfinite(), float("inf"), float(step)).double()
        self._not_finite = here if self._not_finite is None else torch.minimum(self._not_finite, here)

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        old = self.sums.get(name)
        self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def reduce(self, world: World) -> dict[str, Tensor]:
        """Sums over counts, over all ranks; the window stays as it is."""
        return {
            name: (world.sum(total.clone()) / world.sum(count.clone()).clamp(min=1e-12)).cpu()
            for name, (total, count) in sorted(self.sums.items())
        }

    @property
    def first_not_finite(self) -> int | None:
        """The first step whose gradient was not finite (the same on every rank)."""
        return None if self._not_finite is None or self._not_finite.isinf() else int(self._not_finite)

    def to_state(self, world: World) -> dict[str, Any]:
        """What a checkpoint within a window keeps of it: the sums of every rank, in float64. Empty where
        nothing was added."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        own = torch.cat([part.flatten() for name in names for part in self.sums[name]])
        return {
            "shapes": [[name, *(list(part.shape) for part in self.sums[name])] for name in names],
            "ranks": [row.tolist() for row in world.gather(own)],
            "amount": self.amount,
            "seconds": time.monotonic() - self.began,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], world: World) -> "Window":
        """The window as it was: a rank has its own sums again, among fewer or more ranks they are shared
        out."""
        window = cls()
        if not state:
            return window
        rows = torch.tensor(state["ranks"], dtype=torch.float64)  # (ranks then, numbers)
        own = rows[world.rank :: world.size].sum(0).to(world.device)
        for name, *shapes in state["shapes"]:
            sizes = [math.prod(shape) for shape in shapes]
            total, count, own = own.split([*sizes, len(own) - sum(sizes)])
            window._add(name, total.view(shapes[0]), count.view(shapes[1]))
        window.amount, window.began = state["amount"], window.began - state["seconds"]
        return window

    def rate(self) -> float:
        return self.amount / max(time.monotonic() - self.began, 1e-9)


_logs_opened = itertools.count()


class Appended:
    """A file that grows by whole records: one that does not fit on the disk is taken back, and told as a
    `DiskFull`."""

    def __init__(self, path: Path):
        self.path = path
        with telling_full_disk(path, 0):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # closed by close()

    def write(self, record: bytes) -> int:
        end = os.fstat(self._file.fileno()).st_size
        try:
            with telling_full_disk(self.path, len(record)):
                left = memoryview(record)
                while left:
                    left = left[self._file.write(left) :]
        except BaseException:
            self._file.truncate(end)
            raise
        return len(record)

    def take_back(self, num_bytes: int) -> None:
        """Shorten the file by its last bytes."""
        self._file.truncate(os.fstat(self._file.fileno()).st_size - num_bytes)

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard events of one session of a run; those of steps from `purge_step` on of earlier sessions are
    no more shown."""

    def __init__(self, folder: Path, purge_step: int | None):
        # Half a second that only training needs. Its SummaryWriter writes in a thread, which dies with a
        # traceback where the disk is full.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        make_folder(folder)
        # Readers take the files in the order of their names, of sessions within a second by the last number.
        session = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_logs_opened):06d}"
        self._file = Appended(folder / f"events.out.tfevents.{session}")
        self._records, self._event, self._scalar = RecordWriter(self._file), Event, summary.scalar
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._scalar(name, value))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


class RunLog:
    """`metrics.jsonl` and TensorBoard events. Lines after the step that training resumes from are dropped."""

    def __init__(self, run: Path, start: int):
        self.path = run / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self.lines = [
                line for line in map(_parse_line, text.splitlines()) if line and line["step"] <= start
            ]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        self.file = Appended(self.path)
        self.board = Board(run / "tensorboard", purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line for a step: more metrics of the step written last are added to its line."""
        line = {"step": step, **metrics}
        if self.lines and self.lines[-1]["step"] == step:
            before = self.lines.pop()
            self.file.take_back(len(json.dumps(before)) + 1)
            line = {**before, **metrics}
        self.lines.append(line)
        self.file.write(json.dumps(line).encode() + b"\n")
        self.board.add_scalars(metrics, step)

    def summarise(self, steps: int, seconds: float, steps_now: int) -> dict[str, Any]:
        losses = [line["loss"] for line in self.lines if "loss" in line]
        summary = {
            "steps": steps,
            "seconds": seconds,
            "steps_this_time": steps_now,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
        summary |= {
            name: value for name, value in self.lines[-1].items() if name not in ("step", "loss", "lr")
        }
        return summary

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _parse_line(text: str) -> dict[str, Any] | None:
    """A line of metrics; None for what is none: the last one of a killed run, or a damaged one."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
