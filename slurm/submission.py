"""The files of a submission: what was submitted, and the state of each of its tasks.

    PARENT/jobs/NAME/20261121-165431-x7k2/   readable by its user alone
        submission.json                      `Submission`, by the launcher
        41_0_status.json                     `TaskStatus`, by the task; touched every 15 s while it runs
        41_progress.json                     the progress of the command, by `pretrain/progress.py`
        41_0_log.out, 41_0_log.err           submitit's logs

The fourth element of an array has 41_3 in place of 41. All files can be read when neither SLURM nor its
accounts answer.
"""

import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Place = Literal["local", "slurm"]
State = Literal["running", "finished", "failed", "requeued", "stopped"]
HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Submission:
    """What was submitted, as `submission.json` has it.

    `array` is the number of elements, None where there is no array; `pid` the controller's of a local job, on
    `host`; `git` is {"commit", "dirty"} of the checkout, `code` the folder of the snapshot that runs.
    `submitted` is a Unix time.
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
    """The state of a task, written by itself. Of a job of several tasks, that of the first decides.

    `running` may be a task that was killed: its `heartbeat` (Unix time, of the file system's clock) then
    stays behind. `requeued`: it waits for its next attempt, requeued by itself or by SLURM. `stopped`: a
    signal ended it, and it does not start again by itself; a task other than the first is also `stopped` if
    the first was requeued. `status` is the exit status, None while it runs or waits; `attempt` counts from 1;
    `timeouts` are the requeues for lack of time since it last made progress; `began` is when this attempt
    began.
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
    """Raises ValueError if `folder` is not a submission's."""
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
    """The states of each element's ranks; None for a task that has not begun."""
    ranks = range(submission.num_tasks)
    return [
        [read_status(status_path(submission_folder, job_id, rank)) for rank in ranks]
        for job_id in submission.elements
    ]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, but not forced to the disk: after a crash of the machine nobody needs it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def freeze(text: str, folder: Path, *, write: bool = True) -> Path:
    """Write the settings that a job runs on to a file in `folder`, which later edits of the user's file do
    not reach.

    The name follows from the content; with `write` False it is returned and no file is made.
    """
    path = folder / f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
    if write and not path.is_file():
        for private in (folder.parent, folder):  # as `launch` makes them
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


@contextmanager
def submitting(jobs: Path) -> Iterator[None]:
    """Within, no other command submits to `jobs` or cancels there: it waits, and then finds what this one
    did."""
    jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(jobs / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{jobs}: another command is submitting to it; waiting for that", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"{jobs}: cannot be locked ({error.strerror}); do not submit to it twice at the same moment",
                file=sys.stderr,
            )
        yield


class Heartbeat:
    """Touches a file every `seconds` from a thread that keeps no process alive, for as long as the block
    lasts."""

    def __init__(self, path: Path, seconds: float = HEARTBEAT_SECONDS):
        self.path, self.seconds = path, seconds
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _beat(self) -> None:
        while not self._over.wait(self.seconds):
            with suppress(OSError):  # the file server may answer the next beat
                os.utime(self.path)
