"""Run a wordless command in a local process or as a SLURM job.

Every submission has a fresh folder, readable by its user alone, with the pickled `Command`, what was submitted, and the logs and
states of its tasks (`slurm/submission.py`). On SLURM it must lie on a file system that the nodes share.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.command import FAILURE_GRACE_SECONDS, MAX_TIMEOUTS, SIGNAL_AT, TARGET, Command
from slurm.follow import Launched, follow
from slurm.resources import Resources
from slurm.snapshot import NAMES, ROOT, git_state, snapshot, snapshot_path, uncommitted
from slurm.submission import Place, Submission, TaskStatus, read_submission, task_statuses, write_submission

if TYPE_CHECKING:
    from submitit import LocalExecutor, SlurmExecutor

__all__ = [
    "Command",
    "Launched",
    "Place",
    "Submission",
    "TaskStatus",
    "follow",
    "launch",
    "read_submission",
    "require_slurm",
    "sbatch_text",
    "task_statuses",
]

RENDEZVOUS = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
}
OURS = {"WORDLESS_PROGRESS", "WORDLESS_COMMIT", "WORDLESS_ATTEMPT", SIGNAL_AT}
USER_SETTINGS = {"SLURM_CONF", "SLURM_CLUSTERS", "SUBMITIT_PREEMPT_SIGNAL", "SUBMITIT_LOG_LEVEL"}
# -P: the folder where the command was given need not be importable, and may have a folder `slurm` of its own.
PYTHON = [sys.executable, "-P"]


def launch(
    argv: list[str],
    place: Place,
    resources: Resources,
    folder: Path,
    *,
    wait: bool,
    after: Sequence[str] = (),
    after_any: Sequence[str] = (),
    target: str = TARGET,
    out: Path | None = None,
    array: int | None = None,
    part_key: str = "part",
) -> Launched:
    """Run the wordless command `argv` (verb first) in `place`; with `wait`, follow it to its end.

    The submission gets a fresh folder inside `folder`, PARENT/jobs/NAME. `after` are ids of SLURM jobs that must succeed first;
    those of them in `after_any` must only end. `out` is what the command makes, for who reads the submission. With `array` n > 1, SLURM
    gets an array whose element i runs `argv` with `PART_KEY=i/n`, i from 1; locally one job does the whole. ValueError where the job
    cannot be submitted; `status` shows a job that fails; nothing is raised.
    """
    if place == "local" and resources.nodes > 1:
        raise ValueError(
            f"slurm.nodes: {resources.nodes}, but a local job has one; set slurm.nodes=1 or use --on slurm"
        )
    if place == "slurm":
        require_slurm()
    folder = folder.absolute()
    if "%" in str(folder):
        raise ValueError(f"{folder}: SLURM replaces % in the paths of logs; choose a folder without one")
    assert place == "slurm" or not after, "a local job waits for none"
    from submitit.core.utils import FailedJobError

    for private in (folder.parent, folder):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Fresh, because job ids begin again in a new cluster and a job must never find another's result; mkdtemp makes it 0700.
    fresh = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder))
    array = array if place == "slurm" and (array or 1) > 1 else None
    try:
        git = git_state(ROOT)
        if git and (patch := uncommitted(ROOT)):
            (fresh / "uncommitted.patch").write_bytes(patch)
        code = snapshot(ROOT, NAMES, folder.parent) if resources.snapshot else None
        commit = (
            git["commit"][:12] + "+" * git["dirty"] if git else None
        )  # as `meta.json` of an artefact has it
        command = Command(
            argv, target, None if code is None else str(code), commit, resources.signal_delay_seconds
        )
        executor: LocalExecutor | SlurmExecutor
        if place == "local":
            executor = _local_executor(resources, fresh, code)
        else:
            executor = _slurm_executor(
                command, resources, fresh, code, _dependency(after, after_any), array, part_key
            )
        with _outside_any_job(resources):
            if array is None:
                job = executor.submit(command)
            else:
                job = executor.submit_array(
                    [_element(command, part_key, number, array) for number in range(array)]
                )[0]
    except FailedJobError as error:
        shutil.rmtree(fresh)
        raise ValueError(
            f"sbatch refused the job: {str(error).strip()}; --dry-run shows what it was given"
        ) from None
    except ValueError:
        shutil.rmtree(fresh)
        raise
    submission = Submission(
        name=folder.name,
        job_id=job.job_id.split("_")[0],
        place=place,
        argv=argv,
        array=array,
        after=list(after),
        after_any=list(after_any),
        out=None if out is None else str(out.absolute()),
        resources=resources.model_dump(mode="json"),
        submitted=time.time(),
        host=socket.gethostname(),
        pid=int(job.job_id) if place == "local" else None,
        git=git,
        code=command.code,
    )
    write_submission(fresh, submission)
    launched = Launched(submission.job_id, place, fresh, job.paths.stdout, job.paths.stderr, job)
    return follow(launched) if wait else launched


def require_slurm() -> None:
    """Raises ValueError where a program that submitting needs is not on the PATH. Call it before anything is written."""
    absent = [
        name for name in ("sbatch", "srun") if shutil.which(name) is None
    ]  # submitit asks for srun, too
    if absent:
        names = " and no ".join(f"`{name}`" for name in absent)
        raise ValueError(
            f"--on slurm: there is no {names} here; go to a login node of the cluster, or use --on local or --dry-run"
        )


def sbatch_text(
    argv: list[str],
    resources: Resources,
    folder: Path,
    *,
    after: Sequence[str] = (),
    after_any: Sequence[str] = (),
    array: int | None = None,
    part_key: str = "part",
) -> str:
    """The text that `launch` would submit to SLURM, which need not be here. SUBMISSION stands for the fresh folder's name."""
    folder = folder.absolute()
    code = snapshot_path(ROOT, NAMES, folder.parent) if resources.snapshot else None
    array = array if (array or 1) > 1 else None
    executor = _slurm_executor(
        Command(argv), resources, folder / "SUBMISSION", code, _dependency(after, after_any), array, part_key
    )
    if array is not None:
        executor.parameters["map_count"] = array  # as submitit's own submission of an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _element(command: Command, part_key: str, number: int, array: int) -> Command:
    return replace(command, argv=[*command.argv, f"{part_key}={number + 1}/{array}"])


def _dependency(after: Sequence[str], after_any: Sequence[str]) -> str:
    """SLURM's form of it: `afterok:41:42,afterany:43`; empty where a job waits for none."""
    kinds = {
        "afterok": [job for job in after if job not in after_any],
        "afterany": [job for job in after if job in after_any],
    }
    return ",".join(":".join([kind, *jobs]) for kind, jobs in kinds.items() if jobs)


def _slurm_executor(
    command: Command,
    resources: Resources,
    folder: Path,
    code: Path | None,
    dependency: str,
    array: int | None,
    part_key: str,
) -> "SlurmExecutor":
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # `launch` has its own check for SLURM, and `sbatch_text` needs none

    told = str(command) if array is None else f"{command} {part_key}=$((SLURM_ARRAY_TASK_ID + 1))/{array}"
    parameters = resources.slurm_parameters()
    parameters["job_name"] = parameters["job_name"] or f"wordless-{command.argv[0]}"
    parameters["setup"] = [f"# {told}", *parameters["setup"], *_path_to(code)]
    parameters["wckey"] = None  # submitit's default is refused where these keys are accounted for
    # srun does not inherit the CPUs of sbatch in SLURM 22.05 to 23.02; and without the second, the partners of a failed
    # task wait for it until their time is up.
    parameters["srun_args"] = [f"--cpus-per-task={resources.cpus_per_task}", "--kill-on-bad-exit=1"]
    parameters["additional_parameters"] = {
        "requeue": True
    }  # allowed even where the cluster's default is that a job ends
    if dependency:
        parameters["dependency"] = dependency
        parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    executor = Executor(folder, max_num_timeout=MAX_TIMEOUTS, python=shlex.join(PYTHON))
    executor.update_parameters(**parameters)
    return executor


def _local_executor(resources: Resources, folder: Path, code: Path | None) -> "LocalExecutor":
    from submitit import LocalExecutor
    from submitit.local.local import LocalJob

    class Executor(LocalExecutor):
        def _submit_command(self, command: str) -> "LocalJob[Any]":
            """As submitit's, with our controller around the tasks."""
            given = {
                "COMMAND": command,
                "NTASKS": resources.tasks_per_node,
                "TIMEOUT_S": 60 * resources.time_minutes,
                "SIGNAL_DELAY_S": resources.signal_delay_seconds,
                "NODEID": 0,
                "JOB_NUM_NODES": 1,
                "WITH_SHELL": "",
            }
            environment = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in given.items()}
            environment |= {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_STDERR_TO_STDOUT": "",
                "CUDA_VISIBLE_DEVICES": devices,
            }
            arguments = [*PYTHON, "-m", "slurm.controller", str(self.folder), str(FAILURE_GRACE_SECONDS)]
            process = subprocess.Popen(arguments, env={**os.environ, **environment})
            return LocalJob(self.folder, str(process.pid), range(resources.tasks_per_node), process)

    num_gpus, visible = resources.gpus_per_node, os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [str(number) for number in range(num_gpus)]
        if visible is None
        else [name for name in visible.split(",") if name]
    )
    if num_gpus > len(names):
        raise ValueError(
            f"slurm.gpus_per_node: {num_gpus}, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(names)}"
        )
    devices = ",".join(names[:num_gpus])
    setup = [*resources.setup, *_path_to(code)]
    python = shlex.join(["bash", "-c", "\n".join([*setup, 'exec "$@"']), "setup", *PYTHON])
    return Executor(folder, max_num_timeout=MAX_TIMEOUTS, python=python)


def _path_to(code: Path | None) -> list[str]:
    """The shell line that puts a snapshot before whatever `setup` and the environment have there."""
    return (
        [] if code is None else [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    )


@contextmanager
def _outside_any_job(resources: Resources) -> Iterator[None]:
    """The environment without what a surrounding job put there, which the new job would take for its own."""
    before = dict(os.environ)
    for name in before:
        of_a_job = name in RENDEZVOUS | OURS or name.startswith(
            ("SLURM_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
        )
        if of_a_job and name not in USER_SETTINGS:
            del os.environ[name]
    if (
        resources.tasks_per_node > 1
    ):  # as torchrun does, so that the tasks of a node do not each take all of its cores
        os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus_per_task))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
