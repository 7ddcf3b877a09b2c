"""The command `logs`: the last lines that a job's tasks wrote, and new ones as they are written."""

import sys
import time
from pathlib import Path

from slurm.follow import LogCopy
from slurm.jobs import Job, Queue, judge, latest_jobs
from slurm.status import tail

POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0  # between questions to SLURM whether the job is still there


def find_logs(run: Path, stage: str | None, element: int | None, task: int | None) -> tuple[Job, list[Path]]:
    """The last job of a stage, and the paths of stdout and stderr of one of its tasks.

    `element` (from 0) is of an array, `task` the rank; by default the first that failed, else the first.
    Raises ValueError if there is no such job or task.
    """
    parent = run
    if stage is None or not (run / "jobs").is_dir():
        parent, stage = run.absolute().parent, stage or run.absolute().name
    jobs = latest_jobs(parent / "jobs", Queue())
    job = jobs.get(stage) or jobs.get("run")  # a recipe that runs as one job
    if job is None:
        raise ValueError(f"{run}: no job of {stage!r}; there are {', '.join(jobs) or 'none'}")
    elements, tasks = len(job.elements), job.submission.num_tasks
    if element is not None and not 0 <= element < elements:
        raise ValueError(f"--element {element}: job {job.submission.job_id} has {elements}, from 0")
    if task is not None and not 0 <= task < tasks:
        raise ValueError(f"--task {task}: job {job.submission.job_id} has {tasks}, from 0")
    shown = job.decisive if element is None else job.elements[element]
    rank = shown.rank if task is None else task
    return job, [job.folder / f"{shown.job_id}_{rank}_log.{stream}" for stream in ("out", "err")]


def show(
    run: Path, stage: str | None, element: int | None, task: int | None, lines: int, follow: bool
) -> None:
    """Print the last `lines` of a task's stdout and stderr, each under its path; with `follow`, also what is
    added until the job ends."""
    job, paths = find_logs(run, stage, element, task)
    for path in paths:
        print(f"==> {path} <==")
        print("\n".join(tail(path, lines) if path.is_file() else [f"(not there yet: {job.state})"]))
    if follow:
        _follow(job, paths)


def _follow(job: Job, paths: list[Path]) -> None:
    """Print whole lines as they are added to any of the files, until the job has ended."""
    ends = [path.stat().st_size if path.is_file() else 0 for path in paths]
    logs = [LogCopy(path, sys.stdout, position=end) for path, end in zip(paths, ends, strict=True)]
    alive, asked = job.alive, time.monotonic()
    while True:
        if alive and time.monotonic() - asked >= QUEUE_SECONDS:
            asked = time.monotonic()
            alive = judge(job.folder, job.submission, {}, Queue()).alive
        for log in logs:
            log.copy(rest=not alive)
        if not alive:
            return
        time.sleep(POLL_SECONDS)
