"""Two processes resume one run: the first reads what stands and decides, the other is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("resuming_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    with two_processes(WORKER, folder, logs=folder / "logs", timeout=120):
        pass
    return folder


def told(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return found


def test_a_rank_that_misreads_every_checkpoint_goes_on_from_the_step_of_the_first(folder: Path) -> None:
    whole, cut = folder / "whole", folder / "cut"
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, cut)]
    logged = [[{**json.loads(line), "item_per_second": 0} for line in of_run] for of_run in lines]
    assert logged[0] == logged[1] and [line["step"] for line in logged[1]] == [2, 4, 6, 8, 10, 12]
    for name in (
        "step_00000004/model.safetensors",
        "step_00000012/model.safetensors",
        "step_00000012/optimizer.safetensors",
    ):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_the_first_rank_alone_reads_and_each_file_once(folder: Path) -> None:
    files = [
        f"{step}/{name}"
        for step in ("step_00000008", "step_00000004")
        for name in ("model.safetensors", "optimizer.safetensors")
    ]
    assert told(folder, 0)["read"] == [*files[:2], *files]  # what is refused does not come to the best one
    assert told(folder, 1)["read"] == []


def test_what_the_first_rank_refuses_every_rank_refuses_in_its_words(folder: Path) -> None:
    refusals = [told(folder, rank)["refusal"] for rank in (0, 1)]
    assert "holds unfinished work begun with other settings (training.log_every: 2, now 3)" in refusals[0]
    assert refusals[0] == refusals[1]
