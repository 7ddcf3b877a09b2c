"""SIGKILL inside the writing of a checkpoint.

Broken: the process dies, at fifty random moments spread over the save itself, and before every single call of
a save that changes the disk. Must hold: a checkpoint stands that loads, at most one interval back, with no
manual step; and the run that was resumed fifty times is the undisturbed one in weights, optimiser, generator
states, sample ids and logged numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.training.checkpoint import latest_checkpoint
from tests.faults.saving_worker import INTERVAL, MAX_STEPS

ROOT = Path(__file__).parents[2]
KILLS = 50


def work(*arguments: str | Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.faults.saving_worker", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def number_of(name: str | None) -> int:
    return 0 if name is None else int(name.removeprefix("step_"))


def trace(run: Path) -> list[tuple[int, str, str]]:
    return [tuple(json.loads(line)) for line in run.with_suffix(".trace").read_text().splitlines()]


@pytest.mark.slow
def test_fifty_kills_while_saving_cost_an_interval_each_and_change_nothing(tmp_path: Path) -> None:
    _, *killed = work("kills", tmp_path, 0, KILLS)
    assert len(killed) == KILLS
    for kill in killed:
        assert 0 <= kill["step"] - number_of(kill["newest"]) <= INTERVAL, kill
    inside = [kill["left"] for kill in killed if kill["left"]]
    stages = {len(names) for left in inside for names in left.values()}
    assert len(inside) >= KILLS // 4 and len(stages) >= 2, "the kills did not fall into the save"
    whole, again = tmp_path / "whole", tmp_path / "killed"
    ends = [latest_checkpoint(run) for run in (whole, again)]
    assert (
        ends[0] is not None
        and ends[1] is not None
        and ends[0].name == ends[1].name == f"step_{MAX_STEPS:08d}"
    )
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    expected = {step: (items, generator) for step, items, generator in trace(whole)}
    assert sorted(expected) == list(range(MAX_STEPS)) and len(trace(again)) > MAX_STEPS
    for step, items, generator in trace(again):  # those that were lost and done again, too
        assert (items, generator) == expected[step], step
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, again)
    ]
    for lines in logs:
        for line in lines:
            del line["item_per_second"]
    assert logs[0] == logs[1]
    assert (
        json.loads((whole / "meta.json").read_text())["fingerprint"]
        == json.loads((again / "meta.json").read_text())["fingerprint"]
    )
    assert not list(again.glob(".*"))


@pytest.mark.slow
def test_a_kill_before_any_call_of_a_save_leaves_a_checkpoint_that_is_valid(tmp_path: Path) -> None:
    rows = work("steps", tmp_path)
    for case, before in (("absent", 2), ("valid", 4), ("damaged", 2)):
        found = [row for row in rows if row["case"] == case]
        assert len(found) > 8 and [row["status"] for row in found] == [-9] * (len(found) - 1) + [0]
        ends = [(number_of(row["newest"]), row["seconds"]) for row in found]
        assert ends == sorted(ends) and ends[0] == (before, 1.0) and ends[-1] == (4, 2.0), (
            "the old one, then at one stroke the new"
        )
        assert all(row["then"] == ["step_00000006"] for row in found), "the next save clears up"
