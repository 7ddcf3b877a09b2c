"""A task's metrics through fairseq2: a metric of its metric bag, and a recorder that keeps our own log beside
its recorders."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from fairseq2.file_system import GlobalFileSystem
from fairseq2.metrics.recorders import (
    JsonlMetricRecorder,
    LogMetricRecorder,
    MetricDescriptorRegistry,
    MetricRecorder,
    TensorBoardRecorder,
)
from torch import Tensor
from torcheval.metrics import Metric

from pretrain.training.runlog import RunLog
from pretrain.training.task import Loss


class Sums(Metric[dict[str, Tensor]]):  # type: ignore[misc]
    """Totals and counts of a task's metrics, of any shape, on the device; `compute` gives their quotients on
    the CPU."""

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
        return {
            name: (self.sums[f"{name}/total"] / self.sums[f"{name}/count"].clamp(min=1e-12)).cpu()
            for name in names
        }

    def merge_state(self, metrics: Iterable[Self]) -> Self:
        for metric in metrics:
            for key, value in metric.sums.items():
                self._add(key, value.to(self.device))
        return self


class Trained(MetricRecorder):  # type: ignore[misc]
    """Passes on to `recorders` what has something to tell: a run that is stopped right after a line publishes
    one more, of nothing."""

    def __init__(self, recorders: Sequence[MetricRecorder]):
        self._recorders = recorders

    def record_metric_values(
        self, category: str, values: Mapping[str, object], step_nr: int | None = None
    ) -> None:
        if category != "train" or "loss" in values:
            for recorder in self._recorders:
                recorder.record_metric_values(category, values, step_nr)

    def close(self) -> None:
        for recorder in self._recorders:
            recorder.close()


class RunLogRecorder(MetricRecorder):  # type: ignore[misc]
    """Our `metrics.jsonl` and TensorBoard events: a line for what was trained, with the validation of the
    same step.

    Lines of training are written by who prepares them: fairseq2's "train" values hold more than that.
    """

    def __init__(self, log: RunLog):
        self._log = log

    def record_metric_values(
        self, category: str, values: Mapping[str, object], step_nr: int | None = None
    ) -> None:
        if category == "valid":
            assert step_nr is not None
            self._log.write(
                step_nr, {name: value for name, value in values.items() if isinstance(value, (int, float))}
            )

    def close(self) -> None:
        self._log.close()


def recorder(folder: Path, log: RunLog) -> MetricRecorder:
    """fairseq2's own recorders, JSON lines and TensorBoard in `folder` and its log, with ours."""
    descriptors = MetricDescriptorRegistry([])
    theirs = [
        JsonlMetricRecorder(folder, GlobalFileSystem(), descriptors),
        TensorBoardRecorder(folder, descriptors),
    ]
    return Trained([RunLogRecorder(log), *theirs, LogMetricRecorder(descriptors)])
