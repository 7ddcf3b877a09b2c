"""Follows a submitted job: copies its output as it is written, and returns its exit status."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from slurm.jobs import Queue
from slurm.submission import Place, Submission, TaskStatus, read_submission, task_statuses

if TYPE_CHECKING:
    from submitit import Job

QUEUE_SECONDS = 10.0  # between questions to SLURM whether a job is still there
SHARED_DISK_SECONDS = 15.0  # how late a result may show on a cluster's file system after its job has ended
TAIL_LINES = 20


Tasks = dict[tuple[str, int], TaskStatus | None]  # by an element's job id and rank


@dataclass(frozen=True)
class Launched:
    """A submitted job.

    `stdout` and `stderr` are the logs of its first task (of an array: of its first element); `status` is None
    until the job was followed.
    """

    job_id: str
    place: Place
    folder: Path
    stdout: Path
    stderr: Path
    job: "Job[int]" = field(repr=False)
    status: int | None = None


def follow(launched: Launched) -> Launched:
    """Copy the first task's output to stdout and stderr; returns `launched` with the job's exit status.

    After a failure stderr has the task that failed, the end of its stderr unless that was copied already, and
    the paths of its logs. An interrupt (Ctrl-C) or SIGTERM ends a local job, which may save first: the
    interrupt is raised after that. A SLURM job continues.
    """
    submission = read_submission(launched.folder)
    # submitit logs to stdout and, from warnings on, to stderr as well; stdout is for the command's own
    # output.
    logs = [LogCopy(launched.stdout, sys.stdout, hidden="submitit "), LogCopy(launched.stderr, sys.stderr)]
    with _sigterm_ends(launched):
        try:
            _copy_until_over(launched, submission, logs)
        except KeyboardInterrupt:
            _interrupt(launched, logs)
            raise
    ended = _await_results(launched, submission)
    failed = {task: status for task, status in ended.items() if _exit_status(status) != 0}
    if not failed:
        return replace(launched, status=0)
    # A task that failed has the cause; one that was stopped or killed may have been so because of the other.
    rank_of = {"failed": 0, "stopped": 1}
    task = min(failed, key=lambda task: rank_of.get(getattr(failed[task], "state", ""), 2))
    _report_failure(launched, task, failed[task])
    return replace(launched, status=_exit_status(failed[task]) or 1)


@contextmanager
def _sigterm_ends(launched: Launched) -> Iterator[None]:
    """Within, SIGTERM ends a local job."""
    if launched.place != "local" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _end(launched))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tasks(launched: Launched, submission: Submission) -> Tasks:
    elements = zip(submission.elements, task_statuses(launched.folder, submission), strict=True)
    return {(job_id, rank): status for job_id, ranks in elements for rank, status in enumerate(ranks)}


def _copy_until_over(launched: Launched, submission: Submission, logs: list["LogCopy"]) -> None:
    asked_at, over, local = time.monotonic(), False, launched.place == "local"
    while not over:
        time.sleep(0.1 if local else 1.0)
        if local:
            over = launched.job.done()
        elif all(
            status is not None and status.state in ("finished", "failed")
            for status in _tasks(launched, submission).values()
        ):
            over = True
        elif time.monotonic() - asked_at > QUEUE_SECONDS:
            over, asked_at = not _may_be_queued(submission), time.monotonic()
        for log in logs:
            log.copy(rest=over)


def _interrupt(launched: Launched, logs: list["LogCopy"]) -> None:
    """End a local job and wait for as long as it takes to save, unless a second interrupt comes."""
    if launched.place != "local":
        print(f"job {launched.job_id} goes on; `scancel {launched.job_id}` ends it", file=sys.stderr)
        return
    # A terminal's Ctrl-C has reached the job as well; it needs our signal only if it has not.
    _wait(launched, 3.0)
    _end(launched)
    _wait(launched, math.inf)
    for log in logs:
        log.copy(rest=True)


def _wait(launched: Launched, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not launched.job.done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _end(launched: Launched) -> None:
    """End a local job by its controller.

    Not by SIGINT: everything that a background shell without job control starts ignores it.
    """
    if not launched.job.done():
        os.kill(int(launched.job_id), signal.SIGTERM)


def _await_results(launched: Launched, submission: Submission) -> Tasks:
    """How the tasks ended. The file system of a cluster may show it late."""
    deadline = time.monotonic() + (0.0 if launched.place == "local" else SHARED_DISK_SECONDS)
    while True:
        ended = _tasks(launched, submission)
        known = all(map(_is_over, ended.values())) or any(map(_exit_status, ended.values()))
        if known or time.monotonic() >= deadline:
            return ended
        time.sleep(1.0)
        launched.folder.chmod(0o700)  # changes nothing, but makes an NFS client look again


def _is_over(status: TaskStatus | None) -> bool:
    return status is not None and status.state not in ("running", "requeued")


def _exit_status(status: TaskStatus | None) -> int | None:
    """None for a task without a recorded end."""
    return status.status if status is not None and _is_over(status) else None


def _may_be_queued(submission: Submission) -> bool:
    """Whether SLURM has any of the job waiting or running, or does not answer."""
    jobs = Queue().jobs
    return jobs is None or any(job_id in jobs for job_id in submission.elements)


def _report_failure(launched: Launched, task: tuple[str, int], status: TaskStatus | None) -> None:
    job_id, rank = task
    stdout, stderr = (launched.folder / f"{job_id}_{rank}_log.{end}" for end in ("out", "err"))
    if stderr != launched.stderr and stderr.exists():
        lines = stderr.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        sys.stderr.writelines(lines[-TAIL_LINES:])
    if status is None or not _is_over(status):
        ended = "ended without a result (killed, or out of memory or time)"
    elif status.state == "stopped":
        ended = f"was stopped: {status.reason}"
    else:
        ended = f"failed with exit status {status.status}"
    print(f"job {job_id}: task {rank} {ended}; its logs:\n  {stderr}\n  {stdout}", file=sys.stderr)


@dataclass
class LogCopy:
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
