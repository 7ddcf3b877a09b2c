"""The tests' own SLURM: it runs jobs on two nodes, loses a node when told to, and leaves no process behind,
however it ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster, processes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_has_a_task_on_each_node_and_no_accounting_to_ask(real_slurm: Cluster) -> None:
    assert sorted(real_slurm.command("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").split()) == list(
        NODES
    )
    with pytest.raises(RuntimeError, match="accounting storage is disabled"):
        real_slurm.command("sacct")


def test_nothing_of_a_cluster_outlives_the_process_that_asked_for_it(
    tmp_path_factory: pytest.TempPathFactory, real_slurm: Cluster
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    argv = [sys.executable, "-m", "tests.slurm.cluster", str(folder)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        exported = dict(
            asker.stdout.readline().removeprefix("export ").rstrip().split("=", 1) for _ in range(2)
        )
        own, others = Cluster(folder, exported), processes(real_slurm.folder)
        own.command("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 100")
        # 5 daemons; script, srun and its twin, 3 slurmstepd, 2 sleeps
        wait_for(lambda: len(processes(folder)) > 12)
        asker.kill()
    wait_for(lambda: not processes(folder))
    assert set(others) <= set(processes(real_slurm.folder))
    assert os.path.exists(folder / "slurm.conf")  # the logs stay
