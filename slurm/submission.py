"""What a submission leaves on disk: what was submitted, and how each of its tasks fares.

    PARENT/jobs/NAME/20261121-165431-x7k2/   readable by its user alone
        submission.json                      `Submission`, by the launcher
        41_0_status.json                     `TaskStatus`, by the task itself; touched every 15 s while it runs
        41_progress.json                     how far the command is, by its progress bar (`pretrain/progress.py`)
        41_0_log.out, 41_0_log.err           submitit's logs

Of an array, 41_3 stands for 41: its fourth element. All of it can be read where neither SLURM nor its accounts answer.
"""

import json
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Place = Literal["local", "slurm"]
State = Literal["running", "finished", "failed", "requeued", "stopped"]
HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Submission:
    """What was submitted, as `submission.json` has it.

    `array` is the number of elements, None where there is no array; `pid` the controller's of a local job, on `host`; `git` is
    {"commit", "dirty"} of the checkout, `code` the folder of the snapshot that runs. `submitted` is a Unix time.
    """

    name: str
    job_id: str
    place: Place
    argv: list[str]
    array: int | None
    after: list[str]
    out: str | None
    resources: dict[str, Any]
    submitted: float
    host: str
    pid: int | None = None
    git: dict[str, Any] | None = None
    code: str | None = None
    after_any: list[str] = field(default_factory=list)  # those of `after` that need not succeed

    @property
    def elements(self) -> list[str]:
        """The job ids of the elements, "41_0", …; of no array, the job's own."""
        return (
            [self.job_id]
            if self.array is None
            else [f"{self.job_id}_{number}" for number in range(self.array)]
        )

    @property
    def num_tasks(self) -> int:
        """Tasks of an element."""
        return int(self.resources["nodes"] * self.resources["tasks_per_node"])


@dataclass(frozen=True)
class TaskStatus:
    """How a task fares, as it says itself. Of a job of several tasks, the first one's `state` tells what becomes of the job.

    `running` may be a task that was killed: its `heartbeat` (Unix time, of the file system's clock) then stays behind.
    `requeued`: it waits for its next attempt, by its own doing or SLURM's. `stopped`: a signal ended it, and it does not come back
    by itself; a task other than the first is also `stopped` where the first one was requeued. `status` is the exit status, None
    while it runs or waits; `attempt` counts from 1; `timeouts` are the requeues for want of time, since it last got further; `began` is when this
    attempt did.
    """

    state: State
    status: int | None
    attempt: int
    timeouts: int
    host: str
    pid: int
    began: float
    ended: float | None = None
    reason: str | None = None
    heartbeat: float = 0.0


def read_submission(folder: Path) -> Submission:
    """ValueError where `folder` is no submission's."""
    path = folder / "submission.json"
    try:
        return Submission(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{folder}: is no submission's folder: it has no submission.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a submission: {error}") from None


def write_submission(folder: Path, submission: Submission) -> None:
    """Into its folder, atomically."""
    write_json(folder / "submission.json", asdict(submission))


def status_path(folder: Path, job_id: str, rank: int) -> Path:
    """Of a task, which writes it; `job_id` is an element's."""
    return folder / f"{job_id}_{rank}_status.json"


def progress_path(folder: Path, job_id: str) -> Path:
    """Of an element, whose first task writes it."""
    return folder / f"{job_id}_progress.json"


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is none, or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_status(path: Path) -> TaskStatus | None:
    """None where the task has not begun, or its file cannot be read."""
    try:
        return TaskStatus(
            **{**json.loads(path.read_text(encoding="utf-8")), "heartbeat": path.stat().st_mtime}
        )
    except (OSError, ValueError, TypeError):
        return None


def task_statuses(submission_folder: Path, submission: Submission) -> list[list[TaskStatus | None]]:
    """Of each element, of each rank; None for a task that has not begun."""
    ranks = range(submission.num_tasks)
    return [
        [read_status(status_path(submission_folder, job_id, rank)) for rank in ranks]
        for job_id in submission.elements
    ]


def write_json(path: Path, value: Any) -> None:
    """Atomically; not forced to the disk, which nobody needs after a crash of the machine."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Heartbeat:
    """Touches a file every `seconds` from a thread that keeps no process alive, for as long as the block lasts."""

    def __init__(self, path: Path, seconds: float = HEARTBEAT_SECONDS):
        self.path, self.seconds = path, seconds
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _beat(self) -> None:
        while not self._over.wait(self.seconds):
            with suppress(
                OSError
            ):  # a file server that does not answer for a while: the next beat may reach it
                os.utime(self.path)
