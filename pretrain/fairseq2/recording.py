"""A task's metrics through fairseq2: a metric of its metric bag, and a recorder that keeps our own log beside its recorders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from fairseq2.file_system import GlobalFileSystem
from fairseq2.metrics.recorders import (
    CompositeMetricRecorder,
    JsonlMetricRecorder,
    LogMetricRecorder,
    MetricDescriptorRegistry,
    MetricRecorder,
    TensorBoardRecorder,
)
from torch import Tensor
from torcheval.metrics import Metric

from pretrain.runlog import RunLog
from pretrain.task import Loss


class Sums(Metric[dict[str, Tensor]]):  # type: ignore[misc]
    """Totals and counts of a task's metrics, of any shape, on the device; `compute` gives their quotients on the CPU."""

    sums: dict[str, Tensor]

    def __init__(self, device: torch.device | None = None):
        super().__init__(device=device)
        self._add_state("sums", {})

    def update(self, loss: Loss) -> Self:
        for name, (total, count) in {"loss": (loss.total, loss.count), **loss.metrics}.items():
            self.add(name, total, count)
        return self

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """One more (total, count) of a metric."""
        counted = torch.as_tensor(count, device=total.device)
        for key, value in ((f"{name}/total", total), (f"{name}/count", counted)):
            self._add(key, value.detach().double())

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def compute(self) -> dict[str, Tensor]:
        names = sorted(key.removesuffix("/total") for key in self.sums if key.endswith("/total"))
        return {name: (self.sums[f"{name}/total"] / self.sums[f"{name}/count"].clamp(min=1e-12)).cpu() for name in names}

    def merge_state(self, metrics: Iterable[Self]) -> Self:
        for metric in metrics:
            for key, value in metric.sums.items():
                self._add(key, value.to(self.device))
        return self


class RunLogRecorder(MetricRecorder):  # type: ignore[misc]
    """Our `metrics.jsonl` and TensorBoard events: a line for what was trained, with the validation of the same step if one is due."""

    def __init__(self, log: RunLog):
        self.log = log
        self.waiting: tuple[int, dict[str, float]] | None = None  # a line whose validation follows

    def record_metric_values(self, category: str, values: Mapping[str, object], step_nr: int | None = None) -> None:
        """fairseq2's own categories are "train", told by `wait` and `write`, and "valid": its values end the line."""
        assert step_nr is not None
        if category == "valid":
            self.write(step_nr, {name: value for name, value in values.items() if isinstance(value, float)})

    def wait(self, step: int, metrics: dict[str, float]) -> None:
        """Keep a line until its validation comes."""
        self.flush()
        self.waiting = step, metrics

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line, with what waits of the same step."""
        if self.waiting is not None and self.waiting[0] == step:
            metrics, self.waiting = {**self.waiting[1], **metrics}, None
        self.flush()
        self.log.write(step, metrics)

    @property
    def waiting_metrics(self) -> dict[str, float]:
        """What waits; empty where nothing does."""
        return self.waiting[1] if self.waiting is not None else {}

    def flush(self) -> None:
        """Write what waits: no validation follows."""
        if self.waiting is not None:
            (step, metrics), self.waiting = self.waiting, None
            self.log.write(step, metrics)

    def close(self) -> None:
        self.flush()
        self.log.close()


def recorder(folder: Path, ours: RunLogRecorder) -> MetricRecorder:
    """fairseq2's own recorders, JSON lines and TensorBoard in `folder` and its log, with ours."""
    descriptors = MetricDescriptorRegistry([])
    theirs: list[Any] = [JsonlMetricRecorder(folder, GlobalFileSystem(), descriptors), TensorBoardRecorder(folder, descriptors)]
    return CompositeMetricRecorder([ours, *theirs, LogMetricRecorder(descriptors)])
