"""How submitted jobs fare: from the files that they leave, and from squeue where it answers.

The files alone (slurm/submission.py) tell all but one thing: whether a job that has not begun is still queued, and one that gives no
sign of life still there. squeue tells that; sacct, which few small clusters have, is not asked.
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
    """What SLURM has waiting or running, asked for once, when first needed. `answered` is False where squeue does not say."""

    @cached_property
    def jobs(self) -> dict[str, tuple[str, str]] | None:
        """Job id (of an array: each element's, 41_3) -> state and reason; None without an answer."""
        asked = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r"]
        try:
            squeue = subprocess.run(
                asked, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if squeue.returncode:
            return None
        rows = [line.strip().split("|", 2) for line in squeue.stdout.splitlines()]
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
        return (
            "pending" if pending else "running"
        ), "" if reason == "None" else reason  # as SLURM says before it has looked


def controller_runs(folder: Path, submission: Submission) -> bool:
    """Whether the process that controls a local job is alive, on this machine, and is that: numbers of processes come again."""
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
    task: TaskStatus | None = None  # the one that tells most: the first that failed, else the first
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
    def telling(self) -> Element:
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
    for submission, path in sorted(
        found, key=lambda item: item[0].submitted
    ):  # what a job waits for was submitted before it
        jobs[path.parent.name] = judge(path, submission, jobs, queue)
    return jobs


def require_no_job(jobs: Path, cancels: dict[str, str]) -> None:
    """ValueError where a job of one of the names in `cancels` runs or will: two at work on one folder spoil it.

    `cancels` has what `wordless cancel` is to be given for each. Without an answer of squeue, one that has not begun may never do.
    """
    queue = Queue()
    for name, job in latest_jobs(jobs, queue).items():
        if (
            name in cancels
            and job.alive
            and (job.state == "running" or job.submission.place == "local" or queue.answered)
        ):
            raise ValueError(
                f"{name}: job {job.submission.job_id}, which makes it, is {job.state}; wait, or `wordless cancel {cancels[name]}`"
            )


def judge(folder: Path, submission: Submission, others: dict[str, Job], queue: Queue) -> Job:
    """How a submission fares. `others` are those that it may wait for, by name."""
    tasks = task_statuses(folder, submission)
    if all(_outcome(ranks) and _all_ended(ranks) for ranks in tasks):
        there: list[tuple[Presence, str]] = [("unknown", "")] * len(tasks)  # nothing that squeue could add
    else:
        there = [queue.presence(folder, submission, job_id) for job_id in submission.elements]
        folder.chmod(
            0o700
        )  # changes nothing, but makes an NFS client look again: a job may have ended between two looks
        tasks = task_statuses(folder, submission)
    upstream = {name: other for name, other in others.items() if other.submission.job_id in submission.after}
    elements = []
    for job_id, ranks, (presence, reason) in zip(submission.elements, tasks, there, strict=True):
        state, why = _outcome(ranks) or _whereabouts(ranks, presence, reason)
        if state == "failed" and not _all_ended(ranks) and presence in ("running", "pending"):
            # The partner of a task on a node that went away fails first; SLURM notices later, and then requeues the job.
            state, why = (
                ("requeued" if presence == "pending" else "running"),
                f"{why}; SLURM has not ended the job",
            )
        cancelled = (folder / "cancelled.json").is_file()
        if cancelled and (
            state == "stopped" or (presence in ("gone", "unknown") and state in ("lost", *ACTIVE))
        ):
            state, why = "stopped", "cancelled"
        elif state == "queued" and presence in ("gone", "unknown"):
            state, why = _never_begun(presence, upstream)
        elif state == "waiting" and why == "Dependency":
            why = _awaited(upstream)
        current = _of_this_attempt(ranks)
        known = [(rank, task) for rank, task in enumerate(ranks) if task and task in current]
        rank, task = next(
            (item for item in known if item[1].state == "failed"), known[0] if known else (0, None)
        )
        elements.append(
            Element(job_id, state, why, task, rank, _read_progress(progress_path(folder, job_id), task))
        )
    return Job(folder, submission, tuple(elements))


def _outcome(ranks: list[TaskStatus | None]) -> tuple[State, str] | None:
    """What the tasks say of their end; None where they have not all said it."""
    known = _of_this_attempt(ranks)
    if ranks[0] in known and ranks[0] is not None and ranks[0].state == "requeued":
        return None
    if failed := next((task for task in known if task.state == "failed"), None):
        return "failed", failed.reason or f"exit status {failed.status}"
    return (
        ("done", "") if len(known) == len(ranks) and all(task.state == "finished" for task in known) else None
    )


def _all_ended(ranks: list[TaskStatus | None]) -> bool:
    return all(task.state != "running" for task in _of_this_attempt(ranks))


def _of_this_attempt(ranks: list[TaskStatus | None]) -> list[TaskStatus]:
    """Without the words of earlier attempts. A task counts its own, and one that was killed before it began counted one less."""
    known = [task for task in ranks if task]
    attempt, began = (
        max((task.attempt for task in known), default=0),
        max((task.began for task in known), default=0.0),
    )
    return [task for task in known if task.attempt == attempt or (task.ended or began) >= began]


def _whereabouts(ranks: list[TaskStatus | None], presence: Presence, reason: str) -> tuple[State, str]:
    """Of a job whose tasks have not said how it ended. "queued" of one that never began: squeue alone knows where it is."""
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
    if first.state == "requeued":
        return (
            ("lost", "was to be requeued, but is no longer in the queue")
            if presence == "gone"
            else ("requeued", first.reason or "")
        )
    if first.state == "stopped" or (presence == "gone" and any(task.state == "stopped" for task in known)):
        return "stopped", first.reason or ""
    if presence == "gone":
        return "lost", f"ended without a word (killed, or out of memory), last heard of {last_heard}"
    if presence == "unknown" and silent:
        return "lost", f"no sign of life since {last_heard}"
    return "running", f"no sign of life since {last_heard}" if silent else ""


def _never_begun(presence: Presence, upstream: dict[str, Job]) -> tuple[State, str]:
    """Of a job that has left no trace and is not known to be queued."""
    for name, other in upstream.items():
        if other.state not in (*ACTIVE, "done"):
            cause = other.telling.why
            return "stopped", cause if cause.startswith(
                "never began"
            ) else f"never began: {name} {other.state}"
    if presence == "gone":
        return "lost", "never began, and is no longer in the queue"
    if awaited := _awaited(upstream):
        return "waiting", f"{awaited} (squeue does not answer)"
    return "queued", "squeue does not answer"


def _awaited(upstream: dict[str, Job]) -> str:
    """The stages that a job still waits for, in a few words; empty where all have succeeded."""
    left = {name: other for name, other in upstream.items() if other.state != "done"}
    before = {
        job_id for other in left.values() for job_id in other.submission.after
    }  # they wait for these themselves
    names = [name for name, other in left.items() if other.submission.job_id not in before]
    return (
        f"for {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if names
        else ""
    )


def _read_progress(path: Path, task: TaskStatus | None) -> dict[str, Any]:
    """The last word of the progress bar of this attempt; empty where there is none."""
    progress = read_json(path)
    return progress if task and progress.get("time", 0.0) >= task.began - 1.0 else {}
