"""A rank that is lost while the others wait for it.

Broken: of two processes under torchrun one is killed, or stands still (SIGSTOP: a machine that hangs, a
network that is cut), between two steps. Must hold: the job ends within `training.collective_timeout_seconds`
and what torchrun takes to end its processes; the message names the last checkpoint; the same command goes on
from there to the weights, moments and log of a job that lost nobody.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.training.checkpoint import latest_checkpoint
from tests.faults.collective_worker import TIMEOUT_SECONDS

ROOT = Path(__file__).parents[2]
# torchrun sends SIGTERM to the rest, which a stopped process does not hear, and half a minute later SIGKILL;
# to this comes a busy machine
ENDING_SECONDS = {"SIGKILL": 30.0, "SIGSTOP": TIMEOUT_SECONDS + 30.0 + 30.0}


def torchrun(folder: Path, *runs: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.Popen(
        [*command, str(ROOT / "tests" / "faults" / "collective_worker.py"), str(folder), *runs],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, output


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What each job said and when it ended: one that loses nobody and then a killed rank, one that resumes it
    and then loses a rank that stands still, one that resumes that."""
    folder = tmp_path_factory.mktemp("collective")
    told: dict[str, dict[str, object]] = {}
    for lost, runs in (
        ("SIGKILL", ["whole", "SIGKILL=SIGKILL"]),
        ("SIGSTOP", ["SIGKILL", "SIGSTOP=SIGSTOP"]),
    ):
        status, output = torchrun(folder, *runs)
        seconds = time.time() - float((folder / lost / "lost").read_text())
        newest = latest_checkpoint(folder / lost)
        told[lost] = {
            "status": status,
            "output": output,
            "seconds": seconds,
            "newest": newest and newest.name,
            "folder": folder,
        }
    status, output = torchrun(folder, "SIGSTOP")
    assert status == 0, output[-4000:]
    return told


def end_of(run: Path) -> tuple[bytes, bytes, list[dict[str, float]]]:
    newest = latest_checkpoint(run)
    assert newest is not None and newest.name == "step_00000012"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines
    ]
    return (
        (newest / "model.safetensors").read_bytes(),
        (newest / "optimizer.safetensors").read_bytes(),
        logged,
    )


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["SIGKILL", "SIGSTOP"])
def test_a_job_that_loses_a_rank_ends_in_time_and_resumes_to_the_same_bytes(
    jobs: dict[str, dict[str, object]], lost: str
) -> None:
    told = jobs[lost]
    assert told["status"] != 0 and told["newest"] == "step_00000004"
    assert isinstance(told["seconds"], float) and told["seconds"] < ENDING_SECONDS[lost], told["output"]
    folder = told["folder"]
    assert isinstance(folder, Path)
    if lost == "SIGSTOP":  # killed, torchrun may be faster than the other rank
        assert "rank 0 of 2 lost another one" in str(told["output"]) and "step_00000004" in str(
            told["output"]
        )
    assert end_of(folder / lost) == end_of(folder / "whole")
