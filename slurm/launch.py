"""Run a wordless command in a local process or as a SLURM job.

Every submission has a fresh folder, readable by its user alone, with the pickled `Command` and the logs and results of its
tasks. On SLURM it must lie on a file system that the nodes share.
"""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.command import TARGET, Command
from slurm.follow import Launched, Place, follow
from slurm.resources import Resources

if TYPE_CHECKING:
    from submitit import LocalExecutor, SlurmExecutor

__all__ = ["Command", "Launched", "Place", "follow", "launch", "sbatch_text"]

MAX_TIMEOUTS = 20  # requeues after running out of time, so that a job that gets nowhere ends; preemption is not counted
RENDEZVOUS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
USER_SETTINGS = {"SLURM_CONF", "SLURM_CLUSTERS", "SUBMITIT_PREEMPT_SIGNAL", "SUBMITIT_LOG_LEVEL"}


def launch(
    argv: list[str],
    place: Place,
    resources: Resources,
    folder: Path,
    *,
    wait: bool,
    after: str | None = None,
    target: str = TARGET,
) -> Launched:
    """Run the wordless command `argv` (verb first) in `place`; with `wait`, follow it to its end.

    The submission gets a fresh folder inside `folder`. `after` is the id of a SLURM job that must succeed first.
    ValueError where the job cannot be submitted; a job that fails is told by `status`, not raised.
    """
    if place == "local" and resources.nodes > 1:
        raise ValueError(f"slurm.nodes: {resources.nodes}, but a local job has one; set slurm.nodes=1 or use --on slurm")
    if place == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--on slurm: there is no `sbatch` here; go to a login node of the cluster, or use --on local or --dry-run")
    if "%" in str(folder.absolute()):
        raise ValueError(f"{folder}: SLURM replaces % in the paths of logs; choose a folder without one")
    from submitit.core.utils import FailedJobError

    folder.mkdir(parents=True, exist_ok=True)
    # Fresh, because job ids begin again in a new cluster and a job must never find another's result; mkdtemp makes it 0700.
    fresh = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder.absolute()))
    command = Command(argv, target)
    executor = _local_executor(resources, fresh) if place == "local" else _slurm_executor(command, resources, fresh, after)
    with _outside_any_job(resources):
        try:
            job = executor.submit(command)
        except FailedJobError as error:
            raise ValueError(f"sbatch refused the job: {str(error).strip()}; --dry-run shows what it was given") from None
    launched = Launched(job.job_id, place, fresh, job.paths.stdout, job.paths.stderr, job)
    return follow(launched) if wait else launched


def sbatch_text(argv: list[str], resources: Resources, folder: Path, *, after: str | None = None) -> str:
    """The text that `launch` would submit to SLURM, which need not be here. SUBMISSION stands for the fresh folder's name."""
    executor = _slurm_executor(Command(argv), resources, folder.absolute() / "SUBMISSION", after)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _slurm_executor(command: Command, resources: Resources, folder: Path, after: str | None) -> "SlurmExecutor":
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # `launch` has its own check for SLURM, and `sbatch_text` needs none

    parameters = resources.slurm_parameters()
    parameters["job_name"] = parameters["job_name"] or f"wordless-{command.argv[0]}"
    parameters["setup"] = [f"# {command}", *parameters["setup"]]
    parameters["wckey"] = None  # submitit's default is refused where these keys are accounted for
    # srun does not inherit the CPUs of sbatch in SLURM 22.05 to 23.02; and without the second, the partners of a failed
    # task wait for it until their time is up.
    parameters["srun_args"] = [f"--cpus-per-task={resources.cpus_per_task}", "--kill-on-bad-exit=1"]
    if after is not None:
        parameters |= {"dependency": f"afterok:{after}", "additional_parameters": {"kill-on-invalid-dep": "yes"}}
    executor = Executor(folder, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**parameters)
    return executor


def _local_executor(resources: Resources, folder: Path) -> "LocalExecutor":
    from submitit import LocalExecutor

    setup, num_gpus = list(resources.setup), resources.gpus_per_node
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus and visible is not None:  # submitit would number the GPUs from 0
        names = [name for name in visible.split(",") if name]
        if num_gpus > len(names):
            raise ValueError(f"slurm.gpus_per_node: {num_gpus}, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(names)}")
        setup.insert(0, f"export CUDA_VISIBLE_DEVICES={shlex.quote(','.join(names[:num_gpus]))}")
    # submitit's own `setup` takes the wrong process for the job where /bin/sh is bash: its last command replaces the shell.
    python = shlex.join(["bash", "-c", "\n".join([*setup, 'exec "$@"']), "setup", sys.executable])
    executor = LocalExecutor(folder, max_num_timeout=MAX_TIMEOUTS, python=python)
    executor.update_parameters(
        timeout_min=resources.time_minutes, tasks_per_node=resources.tasks_per_node, gpus_per_node=num_gpus
    )  # fmt: skip
    return executor


@contextmanager
def _outside_any_job(resources: Resources) -> Iterator[None]:
    """The environment without what a surrounding job put there, which the new job would take for its own."""
    before = dict(os.environ)
    for name in before:
        of_a_job = name in RENDEZVOUS or name.startswith(("SLURM_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_"))
        if of_a_job and name not in USER_SETTINGS:
            del os.environ[name]
    if resources.tasks_per_node > 1:  # as torchrun does, so that the tasks of a node do not each take all of its cores
        os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus_per_task))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
