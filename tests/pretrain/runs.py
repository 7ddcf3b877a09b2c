"""What two runs of a training must have in common to be the same."""

import json
from pathlib import Path
from typing import Any

from pretrain.training.checkpoint import latest_checkpoint


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """What must be the same in a repeated run: all but the speed."""
    return [
        {name: value for name, value in line.items() if not name.endswith("_per_second")}
        for line in lines(run)
    ]


def assert_same_run(one: Path, two: Path) -> None:
    """The log and the last checkpoint's tensors, to the bit."""
    assert curve(one) == curve(two)
    first, second = latest_checkpoint(one), latest_checkpoint(two)
    assert first is not None and second is not None and first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
