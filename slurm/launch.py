"""Submits a wordless command as a local process or as a SLURM job.

Every submission has a fresh folder, readable by its user alone, with the pickled `Command`, what was
submitted, and the logs and states of its tasks (`slurm/submission.py`). For SLURM it must be on a file system
that the nodes share.
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
from slurm.submission import Place, Submission, write_submission

if TYPE_CHECKING:
    from submitit import Job, LocalExecutor, SlurmExecutor

RENDEZVOUS = set("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split())
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

    The submission gets a fresh folder inside `folder`, PARENT/jobs/NAME. `after` are ids of SLURM jobs that
    must succeed first; those of them in `after_any` must only end. `out` is what the command makes, for
    `wordless status`. With `array` n > 1, SLURM gets an array whose element i runs `argv` with
    `PART_KEY=i/n`, i from 1; locally one job does all of it. Raises ValueError if the job cannot be
    submitted, but not if it fails: see its `status`.
    """
    folder = folder.absolute()
    _require_possible(place, resources, folder)
    assert place == "slurm" or not after, "a local job waits for none"
    fresh = _fresh_folder(folder)
    array = array if place == "slurm" and (array or 1) > 1 else None
    try:
        git, code = _keep_code(resources, fresh)
        commit = git["commit"][:12] + "+" * git["dirty"] if git else None  # as in an artefact's `meta.json`
        command = Command(argv, target, str(code) if code else None, commit, resources.signal_delay_seconds)
        executor: LocalExecutor | SlurmExecutor
        if place == "local":
            executor = _local_executor(resources, fresh, code)
        else:
            dependency = _dependency(after, after_any)
            executor = _slurm_executor(command, resources, fresh, code, dependency, array, part_key)
        job = _submit(executor, command, resources, array, part_key)
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


def _require_possible(place: Place, resources: Resources, folder: Path) -> None:
    if place == "local" and resources.nodes > 1:
        raise ValueError(
            f"slurm.nodes: {resources.nodes}, but a local job has one; set slurm.nodes=1 or use --on slurm"
        )
    if place == "slurm":
        require_slurm()
    if "%" in str(folder):
        raise ValueError(f"{folder}: SLURM replaces % in the paths of logs; choose a folder without one")


def _fresh_folder(folder: Path) -> Path:
    """A new folder in `folder`, readable by the user alone.

    It is new because job ids begin again in a new cluster, and a job must never find another's result.
    """
    for private in (folder.parent, folder):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder))


def _keep_code(resources: Resources, fresh: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """The state of the checkout, whose uncommitted changes are kept in `fresh`, and the snapshot that will
    run."""
    git = git_state(ROOT)
    if git and (patch := uncommitted(ROOT)):
        (fresh / "uncommitted.patch").write_bytes(patch)
    return git, snapshot(ROOT, NAMES, fresh.parents[1]) if resources.snapshot else None


def _submit(
    executor: "LocalExecutor | SlurmExecutor",
    command: Command,
    resources: Resources,
    array: int | None,
    part_key: str,
) -> "Job[int]":
    """The submitted job; the first of an array. Raises ValueError if sbatch refuses it."""
    from submitit.core.utils import FailedJobError

    try:
        with _outside_any_job(resources):
            if array is None:
                return executor.submit(command)
            elements = [
                replace(command, argv=[*command.argv, f"{part_key}={number}/{array}"])
                for number in range(1, array + 1)
            ]
            return executor.submit_array(elements)[0]
    except FailedJobError as error:
        raise ValueError(
            f"sbatch refused the job: {str(error).strip()}; --dry-run shows what it was given"
        ) from None


def require_slurm() -> None:
    """Raises ValueError if a program that submitting needs is not on the PATH. Call it before anything is
    written."""
    absent = [f"`{name}`" for name in ("sbatch", "srun") if shutil.which(name) is None]  # submitit calls srun
    if absent:
        raise ValueError(
            f"--on slurm: there is no {' and no '.join(absent)} here; go to a login node of the cluster, or "
            "use --on local or --dry-run"
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
    """The text that `launch` would give to sbatch, with SUBMISSION for the fresh folder's name. Needs no
    SLURM."""
    folder = folder.absolute()
    code = snapshot_path(ROOT, NAMES, folder.parent) if resources.snapshot else None
    array = array if (array or 1) > 1 else None
    executor = _slurm_executor(
        Command(argv), resources, folder / "SUBMISSION", code, _dependency(after, after_any), array, part_key
    )
    if array is not None:
        executor.parameters["map_count"] = array  # as submitit's own submission of an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _dependency(after: Sequence[str], after_any: Sequence[str]) -> str:
    """SLURM's form of a dependency: `afterok:41:42,afterany:43`; empty if a job waits for none."""
    kinds = {"afterok": set(after) - set(after_any), "afterany": set(after_any)}
    return ",".join(
        ":".join([kind, *(job for job in after if job in jobs)]) for kind, jobs in kinds.items() if jobs
    )


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

    line = str(command) if array is None else f"{command} {part_key}=$((SLURM_ARRAY_TASK_ID + 1))/{array}"
    parameters = resources.slurm_parameters()
    parameters["job_name"] = parameters["job_name"] or f"wordless-{command.argv[0]}"
    parameters["setup"] = [f"# {line}", *parameters["setup"], *_path_to(code)]
    parameters["wckey"] = None  # clusters that account for these keys refuse submitit's default
    # srun does not inherit the CPUs of sbatch in SLURM 22.05 to 23.02. Without the second option, the
    # partners of a failed task wait for it until their time is up.
    parameters["srun_args"] = [f"--cpus-per-task={resources.cpus_per_task}", "--kill-on-bad-exit=1"]
    more: dict[str, Any] = {"requeue": True}  # also on clusters where jobs are not requeued by default
    if dependency:
        parameters["dependency"], more["kill-on-invalid-dep"] = dependency, "yes"
    executor = Executor(folder, max_num_timeout=MAX_TIMEOUTS, python=shlex.join(PYTHON))
    executor.update_parameters(**parameters, additional_parameters=more)
    return executor


def _local_executor(resources: Resources, folder: Path, code: Path | None) -> "LocalExecutor":
    from submitit import LocalExecutor
    from submitit.local.local import LocalJob

    class Executor(LocalExecutor):
        def _submit_command(self, command: str) -> "LocalJob[Any]":
            """As submitit's, with our controller around the tasks."""
            environment = {
                "SUBMITIT_LOCAL_COMMAND": command,
                "SUBMITIT_LOCAL_NTASKS": str(resources.tasks_per_node),
                "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * resources.time_minutes),
                "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(resources.signal_delay_seconds),
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_LOCAL_WITH_SHELL": "",
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_STDERR_TO_STDOUT": "",
                "CUDA_VISIBLE_DEVICES": devices,
            }
            arguments = [*PYTHON, "-m", "slurm.controller", str(self.folder), str(FAILURE_GRACE_SECONDS)]
            process = subprocess.Popen(arguments, env={**os.environ, **environment})
            return LocalJob(self.folder, str(process.pid), range(resources.tasks_per_node), process)

    devices = _devices(resources.gpus_per_node)
    setup = [*resources.setup, *_path_to(code)]
    python = shlex.join(["bash", "-c", "\n".join([*setup, 'exec "$@"']), "setup", *PYTHON])
    return Executor(folder, max_num_timeout=MAX_TIMEOUTS, python=python)


def _devices(num_gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of a local job. Raises ValueError if this process does not have as many."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(num_gpus)) if visible is None else filter(None, visible.split(","))
    if num_gpus > len(found := list(names)):
        raise ValueError(
            f"slurm.gpus_per_node: {num_gpus}, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(found)}"
        )
    return ",".join(found[:num_gpus])


def _path_to(code: Path | None) -> list[str]:
    """The shell line that puts a snapshot before what `setup` and the environment have in PYTHONPATH."""
    path = shlex.quote(str(code))
    return [] if code is None else [f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"]


@contextmanager
def _outside_any_job(resources: Resources) -> Iterator[None]:
    """The environment without what a surrounding job put there, which the new job would take for its own."""
    before, prefixes = dict(os.environ), ("SLURM_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
    for name in before.keys() - USER_SETTINGS:
        if name in RENDEZVOUS | OURS or name.startswith(prefixes):
            del os.environ[name]
    # As torchrun does, so that the tasks of a node do not each take all of its cores.
    if resources.tasks_per_node > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus_per_task))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
