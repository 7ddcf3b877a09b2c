"""The verb `logs`: what a job's tasks wrote, its last lines, and as it comes."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from slurm.jobs import Job, Queue, judge, latest_jobs
from slurm.status import tail

POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0  # between questions to SLURM whether the job is still there


def find_logs(run: Path, stage: str | None, element: int | None, task: int | None) -> tuple[Job, list[Path]]:
    """The last job of a stage, and the paths of stdout and stderr of one of its tasks: by default the one
    that tells most.

    `element` (from 0) is of an array, `task` the rank. ValueError, naming what there is, where there is no
    such job or task.
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
    """Print the last `lines` of a task's stdout and stderr, each under its path; with `follow`, what comes
    until the job ends."""
    job, paths = find_logs(run, stage, element, task)
    for path in paths:
        print(f"==> {path} <==")
        print("\n".join(tail(path, lines) if path.is_file() else [f"(not there yet: {job.state})"]))
    if follow:
        sys.stdout.flush()
        for text in _added(job, paths):
            print(text, end="", flush=True)


def _added(job: Job, paths: list[Path]) -> Iterator[str]:
    """Whole lines as they are added to any of the files, until the job has ended."""
    ends = {path: path.stat().st_size if path.is_file() else 0 for path in paths}
    alive, asked = job.alive, time.monotonic()
    while True:
        if alive and time.monotonic() - asked >= QUEUE_SECONDS:
            asked = time.monotonic()
            alive = judge(job.folder, job.submission, {}, Queue()).alive
        for path in paths:
            if not path.is_file():
                continue
            with open(path, "rb") as file:
                file.seek(ends[path])
                new = file.read()
            whole = len(new) if not alive else new.rfind(b"\n") + 1
            ends[path] += whole
            if whole:
                yield new[:whole].decode(errors="replace")
        if not alive:
            return
        time.sleep(POLL_SECONDS)
