"""A submitted job, and following it: its output as it comes, its exit status, and where to look when it failed."""

import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from submitit import Job

Place = Literal["local", "slurm"]
FAILURE_GRACE_SECONDS = 30.0  # how long the other tasks of a local job outlive one that failed
QUEUE_SECONDS = 10.0  # between questions to SLURM whether a job is still there
SHARED_DISK_SECONDS = 15.0  # how late a result may show on a cluster's file system after its job has ended
TAIL_LINES = 20


@dataclass(frozen=True)
class Launched:
    """A submitted job. `stdout` and `stderr` are the logs of its first task; `status` is None until it was followed."""

    job_id: str
    place: Place
    folder: Path
    stdout: Path
    stderr: Path
    job: "Job[int]" = field(repr=False)
    status: int | None = None


def follow(launched: Launched) -> Launched:
    """Copy the first task's output to stdout and stderr as it comes; at the end return `launched` with its exit status.

    A failure is told on stderr: which task, the end of its stderr unless that was copied already, and where its logs are.
    An interrupt (Ctrl-C) ends a local job; a SLURM job goes on.
    """
    job, local = launched.job, launched.place == "local"
    tasks = [job.task(number) for number in range(job.num_tasks)]
    # submitit's log goes to stdout and, from warnings on, to stderr as well; stdout is for the command's own output.
    logs = [_Log(launched.stdout, sys.stdout, hidden="submitit "), _Log(launched.stderr, sys.stderr)]
    failed_at: float | None = None
    asked_at, over = time.monotonic(), False
    try:
        while not over:
            time.sleep(0.1 if local else 1.0)
            statuses, now = [_status(task) for task in tasks], time.monotonic()
            if local:
                over = job.done()
                failed_at = (failed_at or now) if any(statuses) else None
                if failed_at and now - failed_at > FAILURE_GRACE_SECONDS:  # on SLURM srun ends the partners of a failed task
                    job.cancel()
                    failed_at = math.inf  # once: a second interrupt would keep submitit from killing a task that does not listen
            elif None not in statuses:
                over = True
            elif now - asked_at > QUEUE_SECONDS:
                over, asked_at = not _is_queued(launched.job_id), now
            for log in logs:
                log.copy(rest=over)
    except KeyboardInterrupt:
        if local:  # a terminal's Ctrl-C has reached the job as well: another only if it has not
            deadline = time.monotonic() + 3.0
            while not job.done() and time.monotonic() < deadline:
                time.sleep(0.1)
            if not job.done():
                job.cancel()
        else:
            print(f"job {launched.job_id} goes on; `scancel {launched.job_id}` ends it", file=sys.stderr)
        raise
    statuses = [_status(task) for task in tasks]
    deadline = time.monotonic() + (0.0 if local else SHARED_DISK_SECONDS)
    while None in statuses and not any(statuses) and time.monotonic() < deadline:
        time.sleep(1.0)
        launched.folder.chmod(0o700)  # changes nothing, but makes an NFS client look again
        statuses = [_status(task) for task in tasks]
    failed = [(number, status) for number, status in enumerate(statuses) if status != 0]
    if not failed:
        return replace(launched, status=0)
    # A task that left a status knows why; one that left none was killed, perhaps on account of the other.
    number, status = next((f for f in failed if f[1] is not None), failed[0])
    _report_failure(launched, number, status)
    return replace(launched, status=1 if status is None else status)


def _status(task: "Job[int]") -> int | None:
    """0, the nonzero status of a command (1 for an exception), or None where the task has left no result (yet)."""
    from submitit.core.utils import pickle_load

    try:
        outcome, value = pickle_load(task.paths.result_pickle)
    except FileNotFoundError:
        return None
    if outcome == "success":
        return 0
    stated = re.search(r"CommandFailed: exit status (-?\d+)", value)  # value is a traceback
    return int(stated[1]) if stated else 1


def _is_queued(job_id: str) -> bool:
    """Whether SLURM still has the job waiting or running. Not from sacct, submitit's way: few small clusters keep accounts."""
    try:
        squeue = subprocess.run(["squeue", "--noheader", "--jobs", job_id], check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True  # no answer is no reason to give a job up
    if squeue.returncode:
        return "Invalid job id" not in squeue.stderr
    return bool(squeue.stdout.strip())


def _report_failure(launched: Launched, number: int, status: int | None) -> None:
    paths = launched.job.task(number).paths
    if number > 0 and paths.stderr.exists():
        lines = paths.stderr.read_text(errors="replace").splitlines(keepends=True)
        sys.stderr.writelines(lines[-TAIL_LINES:])
    ended = "ended without a result (killed, or out of memory or time)" if status is None else f"failed with exit status {status}"
    print(f"job {launched.job_id}: task {number} {ended}; its logs:\n  {paths.stderr}\n  {paths.stdout}", file=sys.stderr)


@dataclass
class _Log:
    """Copies what a task adds to its log to a stream of ours, by whole lines."""

    path: Path
    stream: TextIO
    hidden: str = "\0"  # lines that begin with this stay in the file
    position: int = 0

    def copy(self, *, rest: bool) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.position)
            new = file.read()
        end = len(new) if rest else new.rfind(b"\n") + 1
        self.position += end
        lines = new[:end].decode(errors="replace").splitlines(keepends=True)
        self.stream.writelines(line for line in lines if not line.startswith(self.hidden))
        self.stream.flush()
