"""What a run tells of itself: sums of metrics between two log lines, `metrics.jsonl`, TensorBoard events, the summary."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.artefact import atomic_path
from pretrain.parallel import World

if TYPE_CHECKING:
    from pretrain.engine import Loss


class Window:
    """Sums of metrics since the last log line, on the device: nothing here waits for it until `reduce`."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.amount = 0.0
        self.began = time.monotonic()
        self._not_finite: Tensor | None = None  # the first step whose gradient was not

    def add(self, loss: "Loss") -> None:
        for name, (total, count) in {"loss": (loss.total, loss.count), **loss.metrics}.items():
            self._add(name, total.detach().double(), torch.as_tensor(count, device=total.device).detach().double())

    def add_norm(self, norm: Tensor, step: int) -> None:
        """The gradient's norm in `step` (from 1)."""
        self._add("gradient_norm", norm.double(), torch.ones_like(norm).double())
        here = torch.where(norm.isfinite(), float("inf"), float(step)).double()
        self._not_finite = here if self._not_finite is None else torch.minimum(self._not_finite, here)

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        old = self.sums.get(name)
        self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def reduce(self, world: World) -> dict[str, Tensor]:
        """Sums over counts, over all ranks."""
        return {
            name: (world.sum(total) / world.sum(count).clamp(min=1e-12)).cpu() for name, (total, count) in sorted(self.sums.items())
        }

    @property
    def first_not_finite(self) -> int | None:
        """The first step whose gradient was not finite (the same on every rank)."""
        return None if self._not_finite is None or self._not_finite.isinf() else int(self._not_finite)

    def rate(self) -> float:
        return self.amount / max(time.monotonic() - self.began, 1e-9)


class RunLog:
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
