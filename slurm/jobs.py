"""The state of submitted jobs, from the files that they write and, if it answers, from squeue.

The files (slurm/submission.py) have everything but whether a job that has not begun is still queued, and one
that gives no sign of life is still there. squeue has that; sacct is not used, because few small clusters have
it.
"""

import os
import socket
import subprocess
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from slurm.submission import Submission, TaskStatus, progress_path, read_json, read_submission, task_statuses

State = Literal["done", "running", "queued", "waiting", "requeued", "failed", "lost", "stopped"]
Presence = Literal["running", "pending", "gone", "unknown"]
ACTIVE: tuple[State, ...] = ("running", "requeued", "queued", "waiting")
FAULTY: tuple[State, ...] = ("failed", "lost")
SILENT_SECONDS = 90.0  # six heartbeats: without squeue, a job that was not heard of for so long is lost
SQUEUE_SECONDS = 10.0


class Queue:
    """What SLURM has waiting or running, asked once, when first needed."""

    @cached_property
    def jobs(self) -> dict[str, tuple[str, str]] | None:
        """Job id (of an array: each element's, 41_3) -> state and reason; None without an answer."""
        asked = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r"]
        try:
            answer = subprocess.check_output(
                asked, stderr=subprocess.DEVNULL, text=True, timeout=SQUEUE_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            return None
        rows = [line.strip().split("|", 2) for line in answer.splitlines()]
        return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}

    @property
    def answered(self) -> bool:
        return self.jobs is not None

    def presence(self, folder: Path, submission: Submission, job_id: str) -> tuple[Presence, str]:
        """Whether an element is there, and SLURM's reason where it is pending."""
        if submission.place == "local":
            if submission.host != socket.gethostname():
                return "unknown", ""
            return ("running" if controller_runs(folder, submission) else "gone"), ""
        if self.jobs is None:
            return "unknown", ""
        state, reason = self.jobs.get(job_id, ("", ""))
        if not state:
            return "gone", ""
        pending = state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
        # "None" is SLURM's reason before it has looked
        return ("pending" if pending else "running"), "" if reason == "None" else reason


def controller_runs(folder: Path, submission: Submission) -> bool:
    """Whether the process that controls a local job is alive, on this machine, and is that: numbers of
    processes come again."""
    try:
        command = Path(f"/proc/{submission.pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        if Path("/proc/self").exists():
            return False
        asked = ["ps", "-o", "command=", "-p", str(submission.pid)]  # not Linux
        command = subprocess.run(asked, capture_output=True, check=False).stdout
    return os.fsencode(folder.absolute()) in command


@dataclass(frozen=True)
class Element:
    """A job, or one of an array."""

    job_id: str
    state: State
    why: str = ""
    task: TaskStatus | None = None  # the first that failed, else the first
    rank: int = 0
    progress: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A submission and how it fares."""

    folder: Path
    submission: Submission
    elements: tuple[Element, ...]

    @property
    def state(self) -> State:
        """Of an array: of a fault even while others go on, for nothing that depends on it will start."""
        there = {element.state for element in self.elements}
        return next((state for state in (*FAULTY, *ACTIVE, "stopped") if state in there), "done")

    @property
    def alive(self) -> bool:
        """Whether anything of it still runs, or will."""
        return any(element.state in ACTIVE for element in self.elements)

    @property
    def begun(self) -> bool:
        return any(element.task for element in self.elements)

    @property
    def decisive(self) -> Element:
        """The element that its state is of."""
        return next(element for element in self.elements if element.state == self.state)


def latest_jobs(folder: Path, queue: Queue) -> dict[str, Job]:
    """The last submission of each name in a folder `jobs`, in the order of submission."""
    found = []
    for named in sorted(path for path in folder.glob("*") if path.is_dir()):
        submissions = [
            (read_submission(path.parent), path.parent) for path in named.glob("*/submission.json")
        ]
        found += [max(submissions, key=lambda item: item[0].submitted)] if submissions else []
    jobs: dict[str, Job] = {}
    # In order of submission: a job waits only for earlier ones.
    for submission, path in sorted(found, key=lambda item: item[0].submitted):
        jobs[path.parent.name] = judge(path, submission, jobs, queue)
    return jobs


def require_no_job(jobs: Path, cancels: dict[str, str]) -> None:
    """Raises ValueError if a job of one of the names in `cancels` runs or will: two jobs would spoil their
    folder.

    `cancels` has the arguments of `wordless cancel` by name. If squeue does not answer, a job that has not
    begun is ignored, since it may never begin.
    """
    queue = Queue()
    for name, job in latest_jobs(jobs, queue).items():
        certain = job.state == "running" or job.submission.place == "local" or queue.answered
        if name in cancels and job.alive and certain:
            raise ValueError(
                f"{name}: job {job.submission.job_id}, which makes it, is {job.state}; wait, or `wordless "
                f"cancel {cancels[name]}`"
            )


def judge(folder: Path, submission: Submission, others: dict[str, Job], queue: Queue) -> Job:
    """The state of a submission. `others` are those that it may wait for, by name."""
    tasks = task_statuses(folder, submission)
    if all(_outcome(ranks) and _all_ended(ranks) for ranks in tasks):
        there: list[tuple[Presence, str]] = [("unknown", "")] * len(tasks)  # nothing that squeue could add
    else:
        there = [queue.presence(folder, submission, job_id) for job_id in submission.elements]
        # This changes nothing, but makes an NFS client read again: a job may have ended in the meantime.
        folder.chmod(0o700)
        tasks = task_statuses(folder, submission)
    upstream = {name: other for name, other in others.items() if other.submission.job_id in submission.after}
    elements = []
    for job_id, ranks, (presence, reason) in zip(submission.elements, tasks, there, strict=True):
        state, why = _outcome(ranks) or _whereabouts(ranks, presence, reason)
        if state == "failed" and not _all_ended(ranks) and presence in ("running", "pending"):
            # If a node goes away, the partners of its task fail first; SLURM notices later and requeues the
            # job.
            state = "requeued" if presence == "pending" else "running"
            why += "; SLURM has not ended the job"
        absent = presence in ("gone", "unknown")
        ended = state == "stopped" or (absent and state in ("lost", *ACTIVE))
        if ended and (folder / "cancelled.json").is_file():
            state, why = "stopped", "cancelled"
        elif state == "queued" and absent:
            state, why = _never_begun(presence, upstream)
        elif state == "waiting" and why == "Dependency":
            why = _awaited(upstream)
        current = _of_this_attempt(ranks)
        known = [(rank, task) for rank, task in enumerate(ranks) if task in current]
        failed = [(rank, task) for rank, task in known if task and task.state == "failed"]
        rank, task = next(iter([*failed, *known]), (0, None))
        progress = _read_progress(progress_path(folder, job_id), task)
        elements.append(Element(job_id, state, why, task, rank, progress))
    return Job(folder, submission, tuple(elements))


def _outcome(ranks: list[TaskStatus | None]) -> tuple[State, str] | None:
    """How the tasks ended, by their status files; None if not all have ended."""
    known = _of_this_attempt(ranks)
    if ranks[0] in known and ranks[0] is not None and ranks[0].state == "requeued":
        return None
    if failed := next((task for task in known if task.state == "failed"), None):
        return "failed", failed.reason or f"exit status {failed.status}"
    finished = [task for task in known if task.state == "finished"]
    return ("done", "") if len(finished) == len(ranks) else None


def _all_ended(ranks: list[TaskStatus | None]) -> bool:
    return all(task.state != "running" for task in _of_this_attempt(ranks))


def _of_this_attempt(ranks: list[TaskStatus | None]) -> list[TaskStatus]:
    """The states of the last attempt. Each task counts its attempts; one that was killed before it began has
    one less."""
    known = [task for task in ranks if task]
    attempt = max((task.attempt for task in known), default=0)
    began = max((task.began for task in known), default=0.0)
    return [task for task in known if task.attempt == attempt or (task.ended or began) >= began]


def _whereabouts(ranks: list[TaskStatus | None], presence: Presence, reason: str) -> tuple[State, str]:
    """The state of a job whose tasks have not ended. "queued" if it never began: squeue alone knows where it
    is."""
    known = _of_this_attempt(ranks)
    if not known:
        if presence == "pending":
            return ("waiting" if reason.startswith("Dependency") else "queued"), reason
        return ("running", "starting") if presence == "running" else ("queued", reason)
    heard = max(task.heartbeat for task in known)
    last_heard = time.strftime("%Y-%m-%d %H:%M", time.localtime(heard))
    first, silent = known[0], time.time() - heard > SILENT_SECONDS
    if presence == "pending":
        return "requeued", first.reason or reason
    if first.state == "requeued" and presence == "gone":
        return "lost", "was to be requeued, but is no longer in the queue"
    if first.state == "requeued":
        return "requeued", first.reason or ""
    if first.state == "stopped" or (presence == "gone" and any(task.state == "stopped" for task in known)):
        return "stopped", first.reason or ""
    if presence == "gone":
        return "lost", f"ended without a word (killed, or out of memory), last heard of {last_heard}"
    if presence == "unknown" and silent:
        return "lost", f"no sign of life since {last_heard}"
    return "running", f"no sign of life since {last_heard}" if silent else ""


def _never_begun(presence: Presence, upstream: dict[str, Job]) -> tuple[State, str]:
    """The state of a job that has left no trace and is not known to be queued."""
    for name, other in upstream.items():
        if other.state not in (*ACTIVE, "done"):
            cause = other.decisive.why
            first = cause.startswith("never began")
            return "stopped", cause if first else f"never began: {name} {other.state}"
    if presence == "gone":
        return "lost", "never began, and is no longer in the queue"
    if awaited := _awaited(upstream):
        return "waiting", f"{awaited} (squeue does not answer)"
    return "queued", "squeue does not answer"


def _awaited(upstream: dict[str, Job]) -> str:
    """The stages that a job still waits for, in a few words; empty if all have succeeded."""
    left = {name: other for name, other in upstream.items() if other.state != "done"}
    indirect = {job_id for other in left.values() for job_id in other.submission.after}
    names = [name for name, other in left.items() if other.submission.job_id not in indirect]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"for {', '.join(names[:3])}{more}" if names else ""


def _read_progress(path: Path, task: TaskStatus | None) -> dict[str, Any]:
    """The last state of the progress bar of this attempt; empty if there is none."""
    progress = read_json(path)
    return progress if task and progress.get("time", 0.0) >= task.began - 1.0 else {}
